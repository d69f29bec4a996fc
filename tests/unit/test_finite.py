"""NaN in a checkpoint: every command that runs the model ends with the first layer and tensor that make it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from words import add_tokenizer, text

from moeconv.calibrate.run import calibrate
from moeconv.errors import CheckError, InputError
from moeconv.evaluate.gates import failure
from moeconv.evaluate.run import evaluate
from moeconv.families.model import open_model
from moeconv.options import DataOptions, MeasureOptions
from moeconv.plan.execute import execute
from moeconv.quantize.gptq.run import choose_codes
from moeconv.quantize.planner import plan_quantize
from moeconv.stream.finite import NotFiniteError
from moeconv.tensors import all_finite
from moeconv.tune.run import tune

pytestmark = pytest.mark.usefixtures("one_thread")

SEQ_LEN = 16
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


def spoiled(path: Path, name: str, value: float = np.nan) -> Path:
    """A Mixture-of-Experts in which every value of one tensor is `value`."""
    add_tokenizer(tiny.make_moe(path, "qwen3_moe"))
    tensors = tiny.read_tensors(path)
    dtype, shape, _ = tensors[name]
    tensors[name] = (dtype, shape, tiny.encode(np.full(shape, value), dtype))
    tiny.write_shards(path, tensors)
    return path


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    (tmp_path / "a.txt").write_text(text(20 * SEQ_LEN))
    return [str(tmp_path / "a.txt")]


@pytest.mark.parametrize(
    ("name", "value", "where"),
    [
        (EXPERT, np.nan, "layer 1 computes"),
        (NORM, np.inf, "layer 0 computes"),
        (EMBEDDING, np.nan, "the embeddings and the output head compute"),
        (HEAD, np.nan, "the embeddings and the output head compute"),
    ],
)
def test_evaluate_names_the_layer_and_the_tensor(tmp_path, data, name, value, where):
    bad, good = spoiled(tmp_path / "bad", name, value), add_tokenizer(tiny.make_moe(tmp_path / "good", "qwen3_moe"))
    for model, reference in ((bad, None), (good, bad)):
        result = evaluate(model, data=data, seq_len=SEQ_LEN, reference=reference)
        error = failure(result)
        assert isinstance(error, CheckError) and not result["passed"] and result["tokens"] == 20 * (SEQ_LEN - 1)
        assert f"{where} NaN or infinite values: tensor {name!r} of bad contains them" in error.message
    assert result["kl"] is None and failure(evaluate(good, data=data, seq_len=SEQ_LEN)) is None


def test_the_command_ends_with_5_and_prints_json(cli, tmp_path, data):
    command = ("evaluate", spoiled(tmp_path / "bad", EXPERT), "--data", *data, "--seq-len", SEQ_LEN)
    done = cli(*command, "--json")
    result = json.loads(done.out, parse_constant=lambda word: pytest.fail(f"{word} in JSON"))
    assert (done.code, result["loss"], result["passed"]) == (5, None, False)
    assert EXPERT in result["not_finite"]["message"]
    done = cli(*command)
    assert (
        done.code == 5
        and f"the loss is NaN or infinite: layer 1 computes NaN or infinite values: tensor '{EXPERT}'" in (done.err)
    )


def coded(path: Path, out: Path, data: list[str]) -> None:
    model = open_model(path)
    items = [item for item in plan_quantize(model, method="gptq").items() if item.changed == "expert"]
    choose_codes(
        model, items, out, data=DataOptions(tuple(data)), measure=MeasureOptions(seq_len=SEQ_LEN), damping=0.01
    )


@pytest.mark.parametrize(
    "measure",
    [
        lambda path, out, data: calibrate(path, out, data=data, seq_len=SEQ_LEN),
        lambda path, out, data: coded(path, out, data),
        lambda path, out, data: tune(path, out, data=data, seq_len=SEQ_LEN, objective="lm", steps=2, batch_size=2),
        lambda path, out, data: tune(
            path, out, data=data, seq_len=SEQ_LEN, objective="layerwise", teacher=str(path), steps=2, batch_size=2
        ),
    ],
    ids=["calibrate", "gptq", "tune lm", "tune layerwise"],
)
def test_what_measures_is_refused_with_the_layer(tmp_path, data, measure: Callable[..., Any]):
    for i, name in enumerate((EXPERT, NORM)):
        with pytest.raises(NotFiniteError, match=f"layer {1 - i} computes NaN or infinite values: tensor '{name}'"):
            measure(spoiled(tmp_path / f"bad{i}", name), tmp_path / "out", data)
    assert not (tmp_path / "out").exists()


def test_values_that_overflow_from_finite_weights_say_so(tmp_path, data):
    large = spoiled(tmp_path / "large", "model.layers.1.post_attention_layernorm.weight", 1e38)
    result = evaluate(large, data=data, seq_len=SEQ_LEN)
    assert (
        "layer 1 computes NaN or infinite values in large, although its weights are finite: the values "
        "overflow in float32" in (result["not_finite"]["message"])
    )


def test_quantize_warns_of_what_it_copies_and_refuses_what_it_packs(tmp_path):
    model = open_model(spoiled(tmp_path / "norm", NORM))
    result = execute(plan_quantize(model), source=model.checkpoint, out=tmp_path / "out")
    assert result.warnings == [f"tensor {NORM!r} holds NaN or infinite values"]
    with pytest.raises(InputError, match="holds NaN or infinite values") as caught:
        execute(plan_quantize(model), source=model.checkpoint, out=tmp_path / "strict", strict=True)
    assert "packed" in caught.value.hint
    model = open_model(spoiled(tmp_path / "expert", EXPERT))
    with pytest.raises(InputError, match=f"tensor '{EXPERT}'"):
        execute(plan_quantize(model), source=model.checkpoint, out=tmp_path / "packed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_look_at_activations_sees_every_value_and_takes_no_memory(dtype):
    values = torch.randn(64, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    given = values.untyped_storage().data_ptr()

    class Sizes(TorchDispatchMode):
        """The numbers of elements that operations return in memory of their own."""

        seen: ClassVar[list[int]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            parts = [t for t in (made if isinstance(made, tuple) else (made,)) if torch.is_tensor(t)]
            self.seen.extend(t.numel() for t in parts if t.untyped_storage().data_ptr() != given)
            return made

    with Sizes():
        assert all_finite(values) and all_finite(values[:0])
    assert max(Sizes.seen) == 1
    for bad in (np.nan, np.inf, -np.inf):
        for place in (0, 1000, -1):
            spoilt = values.clone()
            spoilt.view(-1)[place] = bad
            assert not all_finite(spoilt)
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
        assert all_finite(torch.ones(3).to(kind)) and not all_finite(torch.tensor([1.0, np.nan]).to(kind))
