"""The number of operations that measuring a layer takes does not depend on its number of experts.

Counted is what torch dispatches between the reading of stored tensors and the writing of results, which are one
operation or a few per tensor on disk.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from words import add_tokenizer, text

from moeconv.calibrate.run import calibrate
from moeconv.data.windows import load_tokens
from moeconv.evaluate.run import evaluate
from moeconv.families.model import open_model
from moeconv.options import DataOptions, MeasureOptions
from moeconv.prune.repair.heal import Heal
from moeconv.prune.repair.pruned import pruned_pass
from moeconv.prune.repair.refit import Refit
from moeconv.prune.repair.variant import Variant
from moeconv.quantize.gptq import need
from moeconv.quantize.gptq.run import choose_codes
from moeconv.quantize.step import plan_packing
from moeconv.requests import QuantizeRequest, request
from moeconv.stream.layers import LayerStream, fast_experts
from tests.contract.stock import MOE_CASES, row_of, save_stock

pytestmark = pytest.mark.usefixtures("one_thread")

FILES = ("moeconv/plan/kernels/", "moeconv/tensors.py", "moeconv/stream/skeleton.py", "moeconv/quantize/gptq/grids.py")
METHODS = ("moeconv/plan/kernels/pack/levels.py", "moeconv/plan/kernels/pack/scales.py")  # counted nevertheless
HOST = ("_local_scalar_dense", "nonzero", "unique")  # a value of the device that the host waits for


class Operations(TorchDispatchMode):
    """Counts operations by the innermost function of moeconv that calls them, and those that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()
        self.host = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        frame = sys._getframe(1)
        while frame.f_back is not None and ("/moeconv/" not in frame.f_code.co_filename or "/tests/" in str(frame)):
            frame = frame.f_back
        where = "moeconv/" + frame.f_code.co_filename.rpartition("/moeconv/")[2]
        if where in METHODS or not where.startswith(FILES):
            self.of[f"{where}:{frame.f_code.co_name}"] += 1
            self.host += any(name in str(func) for name in HOST)
        return func(*args, **(kwargs or {}))


def refit(path: Path, data: str, *, steps: int = 0) -> None:
    model = open_model(path)
    read = load_tokens([data], path, tokens=256, seq_len=32, seed=0)
    keep = {layer: range(0, model.num_experts, 2) for layer in model.moe_layers}
    stream = LayerStream(model, read.windows, experts=fast_experts(model, torch.float32), in_place=steps > 0)
    heal = Heal(steps) if steps else None
    pruned_pass(stream, [Variant(keep=dict(keep), refit=Refit(), heal=heal, on_healed=lambda *_: None)])


def gptq(path: Path, data: str) -> None:
    model = open_model(path)
    values = {"model": str(path), "out": "", "scheme": "int4", "group_size": "32", "method": "gptq"}
    packing = plan_packing(model, request(QuantizeRequest, values))
    items = [i for i in packing.plan.items() if i.changed == "expert"]
    measure = MeasureOptions(tokens=256, seq_len=32, device="cpu")
    choose_codes(
        model, items, path.with_suffix(".codes"), data=DataOptions(data=(data,)), measure=measure, damping=0.01,
        view=packing.view,
    )  # fmt: skip


VERBS: dict[str, Callable[[Path, str], object]] = {
    "calibrate": lambda path, data: calibrate(
        path, path.with_suffix(".stats"), data=[data], seq_len=32, tokens=256, sample_tokens=64, device="cpu"
    ),
    "evaluate": lambda path, data: evaluate(path, data=[data], seq_len=32, tokens=256, device="cpu"),
    "refit": refit,
    "heal": lambda path, data: refit(path, data, steps=3),
    "gptq": gptq,
}
ALL = [
    *((case, verb) for case in ("qwen3_moe", "mixtral", "deepseek_v3") for verb in VERBS),
    # transformers stacks their experts in another way than gptq can separate
    *((case, verb) for case in ("gpt_oss", "granitemoe") for verb in VERBS if verb != "gptq"),
    *((case, "gptq") for case in ("olmoe", "glm4_moe", "phimoe")),
    # its experts take no list of (token, expert) pairs: only the forward pass is one call for all experts
    ("llama4", "evaluate"),
]


def counted(case: str, verb: str, experts: int, folder: Path) -> Operations:
    """The operations of a verb on one layer with experts, beside a dense one in families that start with it, or on the
    layers of the case where its config names them."""
    kind, config = MOE_CASES[case]
    counts = {key: experts for key in row_of(case).experts.count if key in config}
    layers = {"num_hidden_layers": config.get("first_k_dense_replace", 0) + 1} if case != "llama4" else {}
    kinds = {key: config[key][:1] for key in ("layer_types", "mlp_layer_types") if layers and key in config}
    path = save_stock(folder / f"{experts}", kind, config | counts | layers | kinds, dtype=torch.float32)
    data = folder / "text"
    data.write_text(text(300))
    with Operations() as found:
        VERBS[verb](add_tokenizer(path), str(data))
    return found


@pytest.mark.slow(keep=3)
@pytest.mark.parametrize(("case", "verb"), ALL)
def test_operations_do_not_grow_with_the_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, verb: str
) -> None:
    monkeypatch.setattr(need, "ROWS_PER_CALL", 1 << 20)  # the work is divided by its size alone
    few, many = (counted(case, verb, experts, tmp_path) for experts in (8, 128))
    grown = {where: (few.of[where], n) for where, n in many.of.items() if abs(n - few.of[where]) > 0.1 * few.of[where]}
    assert abs(many.of.total() - few.of.total()) <= 0.1 * few.of.total(), grown
    assert many.host <= few.host + 2, "reads of the device by the host"


@pytest.mark.slow
def test_only_stock_code_loops_where_a_family_has_no_grouped_experts(tmp_path: Path) -> None:
    few, many = (counted("dbrx", "calibrate", experts, tmp_path) for experts in (8, 128))
    stock = ("moeconv/stream/experts.py:pair_outputs", "moeconv/stream/layer.py:run")
    own = [found.of.total() - sum(found.of[where] for where in stock) for found in (few, many)]
    assert abs(own[1] - own[0]) <= 0.1 * own[0]
