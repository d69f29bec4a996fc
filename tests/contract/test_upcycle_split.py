"""Contract: an FFN cut into shared and routed experts is the dense one where all experts are on, in stock classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moeconv.calibrate.neurons import load_neurons, measure_neurons
from moeconv.data.windows import Source, TokenData
from moeconv.families.model import open_model
from moeconv.options import UpcycleOptions
from moeconv.plan.execute import execute
from moeconv.plan.meter import SilentMeter
from moeconv.plan.partition import load_partition
from moeconv.stream.layers import LayerStream
from moeconv.upcycle.partition import write_partition
from moeconv.upcycle.planner import plan_upcycle
from moeconv.upcycle.split import split_options, split_shape
from tests.contract.stock import DENSE_CASES, VOCAB, load, logits, relative_difference, save_stock
from tests.tiny import edit_json

torch.set_num_threads(1)
# (dense case, target, shared experts): separate, packed, fused, transposed and biased experts; every kind of router
CASES = [
    ("llama", "glm4_moe", "1"), ("llama", "mixtral", None), ("llama", "qwen2_moe", "2"), ("llama", "granitemoe", None),
    ("llama", "ernie4_5_moe", "1"), ("llama-mlp-bias", "gpt_oss", None), ("qwen2", "qwen2_moe", "1"),
    ("qwen3", "qwen3_moe", None), ("qwen3", "dots1", "1"), ("phi3", "mixtral", None),
    ("granite", "granitemoeshared", "1"),
    ("olmo2", "flex_olmo", None), ("youtu", "deepseek_v3", "1"), ("lfm2", "lfm2_moe", None),
    ("hunyuan_v1_dense", "hunyuan_v1_moe", "1"), ("cohere2", "cohere2_moe", "1"),
]  # fmt: skip


def _tokens() -> TokenData:
    windows = np.random.default_rng(3).integers(3, VOCAB, (16, 32))
    return TokenData(windows, np.zeros(16, np.int64), (Source("random", "0" * 64, windows.size),))


def convert(source: Path, folder: Path, **parameters):
    """Measure, decide and write; returns (plan, partition)."""
    model, meter = open_model(source), SilentMeter()
    options = UpcycleOptions(method="split", **parameters)
    stream = LayerStream(model, _tokens().windows)
    folder.mkdir()
    measure_neurons(stream, _tokens(), folder / "stats", seed=0, sample_tokens=512, overwrite=False)
    shape = split_shape(model, split_options(model, options))
    write_partition(
        model, load_neurons(folder / "stats", model), folder / "partition", experts=shape.experts, top_k=shape.top_k,
        shared=shape.shared, width=shape.width, layers=shape.layers, varied=shape.varied, best=shape.best,
        device=torch.device("cpu"), seed=0, meter=meter,
    )  # fmt: skip
    partition = load_partition(folder / "partition")
    plan = plan_upcycle(model, partition=partition, method="split", **parameters)
    execute(plan, source=model.checkpoint, out=folder / "moe", origins={"partition": partition.file}, jobs=1)
    assert plan.promise == plan.changed
    return plan, partition


@pytest.mark.parametrize(("case", "target", "shared"), CASES)
def test_all_experts_on_is_the_dense_model(tmp_path, case, target, shared):
    model_type, config = DENSE_CASES[case]
    source = save_stock(tmp_path / "dense", model_type, config, dtype=torch.float32)
    held = int(shared or 0)
    experts = 4 - held
    plan, _ = convert(source, tmp_path / "all", to=target, experts=experts, top_k=experts, shared_experts=shared)
    assert plan.block["expert_width"] == open_model(source).ffn_width // 4
    tolerance = 1e-3 if case == "lfm2" else 1e-5  # its convolution's own noise
    assert relative_difference(logits(load(source)), logits(load(tmp_path / "all" / "moe"))) <= tolerance


def test_a_split_written_for_fewer_experts_is_not_the_dense_model_with_all_of_them_on(tmp_path):
    """Its router and the scale of its experts are fitted to its own top-k, so that config.json alone changes both."""
    source = save_stock(tmp_path / "dense", *DENSE_CASES["llama"], dtype=torch.float32)
    convert(source, tmp_path / "half", to="mixtral", experts=4, top_k=2)
    edit_json(tmp_path / "half" / "moe" / "config.json", num_experts_per_tok=4)
    assert relative_difference(logits(load(source)), logits(load(tmp_path / "half" / "moe"))) > 0.1


@pytest.mark.parametrize(("target", "shared"), [("glm4_moe", "1"), ("mixtral", None)])
def test_the_stock_router_picks_what_was_fitted_at_equal_weights(tmp_path, target, shared):
    source = save_stock(tmp_path / "dense", *DENSE_CASES["llama"], dtype=torch.float32)
    experts = 6 - int(shared or 0)
    plan, partition = convert(source, tmp_path / "half", to=target, experts=experts, top_k=2, shared_experts=shared)
    assert plan.block["active_share"] == pytest.approx((2 + int(shared or 0)) / 6)
    moe = load(tmp_path / "half" / "moe")
    seen = []
    moe.model.layers[1].mlp.experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    logits(moe)
    hidden, index, weights = seen[0]
    scale = plan.config.get("routed_scaling_factor", 1.0)
    assert torch.allclose(weights, torch.full_like(weights, scale / 2), rtol=1e-4)
    read = {n: np.frombuffer(partition.file.read(f"layer.1.{n}"), np.float32) for n in ("router", "always")}
    rows, always = torch.from_numpy(read["router"].copy()).view(experts, -1), torch.from_numpy(read["always"].copy())
    wanted = torch.topk(hidden @ rows.T + 1e4 * always, 2).indices
    same = (wanted.sort(1).values == index.sort(1).values).all(1).float().mean()
    assert same > 0.97  # logits within a hundredth of their spread may change places


def test_the_same_command_gives_the_same_bytes_and_dense_layers_stay(tmp_path, cli):
    source = save_stock(tmp_path / "dense", *DENSE_CASES["llama"], dtype=torch.float32)
    for name in ("a", "b"):
        _, partition = convert(
            source, tmp_path / name, to="qwen2_moe", experts=5, top_k=2, shared_experts="1", layers="auto:2"
        )
    assert (tmp_path / "a" / "partition").read_bytes() == (tmp_path / "b" / "partition").read_bytes()
    for file in (tmp_path / "a" / "moe").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "b" / "moe" / file.name).read_bytes()
    errors = {row["layer"]: row["error"] for row in partition.metadata["layers"]}
    assert open_model(tmp_path / "a" / "moe").moe_layers == tuple(sorted(errors)) and len(errors) == 2
    load(tmp_path / "a" / "moe")
