"""Experts that stay as they are stored and are widened a few at a time give what experts in place give."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from words import add_tokenizer, text

from moeconv.calibrate import sample
from moeconv.calibrate.artifact import load_statistics
from moeconv.calibrate.need import sample_size
from moeconv.calibrate.run import calibrate
from moeconv.calibrate.sample import on_all_experts
from moeconv.families.model import open_model
from moeconv.plan.execute import execute
from moeconv.prune.repair.pruned import pruned_pass
from moeconv.prune.repair.refit import Refit
from moeconv.prune.repair.variant import Variant
from moeconv.quantize.planner import plan_quantize
from moeconv.stream import stored
from moeconv.stream.experts import activations, down_inputs, down_projections, pair_outputs, with_down
from moeconv.stream.layers import LayerStream
from moeconv.stream.need import sample_room
from tests.contract.stock import MOE_CASES, save_stock

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = np.random.default_rng(0).integers(3, 60, (2, 12))


@pytest.fixture
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer is too large to be put in place, every group a single expert."""
    monkeypatch.setattr(stored, "GROUP_BYTES", 1)


def one_expert(forward: Callable[..., torch.Tensor], x: torch.Tensor, expert: int) -> torch.Tensor:
    """The output of one expert."""
    return forward(x, torch.full((len(x), 1), expert), torch.ones(len(x), 1))


def passed(path: Path, **keywords: Any) -> tuple[torch.Tensor, int]:
    """The final activations, and how many layers kept their experts as stored."""
    stream, count = LayerStream(open_model(path), IDS, dtype=torch.float32, **keywords), 0
    for layer in stream.layers():
        count += layer.experts is not None and stored.stored_in(layer.experts) is not None
    return stream.hidden, count


LAYOUTS = {  # per expert, packed, transposed with biases, without a gate, in groups; dbrx does not come apart
    "mixtral": 3, "granitemoe": 3, "gpt_oss": 3, "aria_text": 3, "nemotron_h": 2, "deepseek_v3": 2, "qwen3_5_moe": 3,
    "qwen3_vl_moe": 3,
    "dbrx": 0, "llama4": 2,
}  # fmt: skip


@pytest.mark.slow(keep=3)
@pytest.mark.parametrize("case", LAYOUTS)
@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_every_layout_bit_for_bit(tmp_path: Path, case: str, experts: str, one_at_a_time: None) -> None:
    path = Path(save_stock(tmp_path / "moe", *MOE_CASES[case], dtype=torch.bfloat16))
    expected, none = passed(path, experts=experts, in_place=True)
    found, count = passed(path, experts=experts)
    assert (none, count) == (0, LAYOUTS[case])
    if case == "llama4":  # its class multiplies matrices of all tokens for every expert, most of them zeros
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(found, expected)


def fp8(path: Path) -> Path:
    """A Qwen3-MoE whose experts are FP8 in blocks of 128 x 128, as DeepSeek-V3 is published."""
    tiny.make_moe(path, "qwen3_moe", experts=6, hidden=128, intermediate=256)
    draw, tensors = np.random.default_rng(1), tiny.read_tensors(path)
    for name, (_, shape, _) in list(tensors.items()):
        if ".experts." in name:
            codes = draw.integers(0, 120, shape, np.uint8) | draw.integers(0, 2, shape, np.uint8) << 7
            scales = draw.uniform(1e-3, 2e-3, tuple(-(-n // 128) for n in shape)).astype(np.float32)
            tensors[name] = ("F8_E4M3", shape, codes.tobytes())
            tensors[f"{name}_scale_inv"] = ("F32", scales.shape, scales.tobytes())
    tiny.write_shards(path, tensors)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (path / "config.json").write_text(json.dumps(config))
    return path


def packed(path: Path, format: str, scheme: str) -> Path:
    if format == "fp8":
        return fp8(path)
    source = open_model(tiny.make_moe(path.with_name("plain"), "qwen3_moe", experts=6, hidden=64, intermediate=128))
    plan = plan_quantize(source, format=format, scheme=scheme, group_size="auto")
    execute(plan, source=source.checkpoint, out=path)
    return path


PACKINGS = [("compressed-tensors", "int4"), ("bitsandbytes", "nf4"), ("bitsandbytes", "int8"), ("fp8", "")]


@pytest.mark.parametrize(("format", "scheme"), PACKINGS)
def test_every_packing_from_memory_and_from_disk(tmp_path: Path, format: str, scheme: str, one_at_a_time: None) -> None:
    path = packed(tmp_path / "moe", format, scheme)
    expected, _ = passed(path, in_place=True)
    for held in (True, False):
        found, count = passed(path, held=held)
        assert count == 2 and torch.equal(found, expected)


def test_parameters_stay_empty_and_nothing_is_left_behind(tmp_path: Path, one_at_a_time: None) -> None:
    path = tiny.make_moe(tmp_path / "moe", "qwen3_moe", experts=6)
    stream = LayerStream(open_model(path), IDS)
    for layer in stream.layers():
        assert layer.experts is not None and all(p.is_meta for p in layer.experts.parameters())
        held = stored.stored_in(layer.experts)
        assert held is not None and {t.dtype for t in held.fused.values()} == {torch.bfloat16}
    assert all("forward" not in vars(m) and stored.stored_in(m) is None for m in stream.skeleton.module.modules())


def test_statistics_of_both_are_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = add_tokenizer(tiny.make_moe(tmp_path / "moe", "qwen3_moe", experts=6, top_k=3))
    (tmp_path / "text").write_text(text(300))
    for name, size in (("placed", 1 << 25), ("stored", 1)):
        monkeypatch.setattr(stored, "GROUP_BYTES", size)
        calibrate(path, tmp_path / name, data=[str(tmp_path / "text")], seq_len=16, device="cpu")
    one, other = (load_statistics(tmp_path / name).file for name in ("placed", "stored"))
    assert all(one.read(name) == other.read(name) for name in one.tensors)


def test_refit_and_replaced_down_projections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny.make_moe(tmp_path / "moe", "qwen3_moe", experts=6, top_k=2)
    made: dict[int, list[torch.Tensor]] = {}
    for size in (1 << 25, 1):
        monkeypatch.setattr(stored, "GROUP_BYTES", size)
        stream = LayerStream(open_model(path), IDS)
        variant = Variant(keep={0: [0, 1, 2, 4], 1: [1, 2, 3, 5]}, refit=Refit())
        seen = made.setdefault(size, [])
        variant.on_layer = lambda _layer, _experts, downs, seen=seen: seen.append(downs)
        pruned_pass(stream, [variant])
        seen.append(variant.hidden)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(made[1 << 25], made[1], strict=True))


def test_one_expert_alone(tmp_path: Path, one_at_a_time: None) -> None:
    path = Path(save_stock(tmp_path / "moe", *MOE_CASES["gpt_oss"], dtype=torch.bfloat16))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    twins = [next(LayerStream(open_model(path), IDS, in_place=flag).layers()).experts for flag in (True, False)]
    placed, kept = twins
    assert placed is not None and kept is not None and stored.stored_in(kept) is not None
    assert torch.equal(activations(placed, x, 3), activations(kept, x, 3))
    down = down_projections(kept, [1, 3])
    assert torch.equal(down, down_projections(placed, [1, 3]))
    for experts in (placed, kept):
        before = one_expert(experts.forward, x, 3)
        with with_down(experts, [1, 3], down * 2):
            assert torch.equal(down_projections(experts, [1, 3]), down * 2)
            assert not torch.equal(one_expert(experts.forward, x, 3), before)
        assert torch.equal(one_expert(experts.forward, x, 3), before)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("case", ["qwen3_moe", "gpt_oss"])
def test_inputs_of_down_projections_keep_the_order_of_the_pairs(tmp_path: Path, case: str, experts: str) -> None:
    """Many pairs per expert: torch's sort, which the stock code uses, does not keep the order of equal values."""
    path = Path(save_stock(tmp_path / "moe", *MOE_CASES[case], dtype=torch.float32))
    module = next(LayerStream(open_model(path), IDS, experts=experts).layers()).experts
    draw = torch.Generator().manual_seed(0)
    x, expert = torch.randn(3000, 64, generator=draw), torch.randint(0, 8, (3000,), generator=draw).sort().values
    token = torch.randperm(3000, generator=draw)
    with torch.no_grad():
        made = torch.cat([rows for _, rows in down_inputs(module, x, token, expert)])
        for e in range(8):
            assert torch.allclose(made[expert == e], activations(module, x[token[expert == e]], e), atol=1e-5)


@pytest.mark.parametrize(("size", "width", "off"), [(1, 4, 1e-6), (1 << 25, 4, 1e-6), (1, 2, 1e-4)])
def test_all_pairs_at_once_are_the_experts_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, width: int, off: float
) -> None:
    """Outputs of any (token, expert) list, cosines and projections, against one expert after another in float64."""
    monkeypatch.setattr(stored, "GROUP_BYTES", size)
    monkeypatch.setattr(sample, "sample_room", lambda *_: (7, width))
    path = Path(save_stock(tmp_path / "moe", *MOE_CASES["qwen3_moe"], dtype=torch.bfloat16))
    experts = next(LayerStream(open_model(path), IDS).layers()).experts
    assert experts is not None
    draw = torch.Generator().manual_seed(0)
    x, matrix = torch.randn(20, 64, generator=draw), torch.randn(64, 9, generator=draw, dtype=torch.float64)
    with torch.no_grad():
        alone = torch.stack([one_expert(experts.forward, x, e) for e in range(8)]).double()  # [E, n, H]
        expert = torch.randint(0, 8, (50,), generator=draw).sort().values
        token = torch.randint(0, 20, (50,), generator=draw)
        blocks = list(pair_outputs(experts, x, token, expert))
        assert torch.allclose(torch.cat([b for _, b in blocks]).double(), alone[expert, token], rtol=1e-6, atol=1e-7)
        cosine, projected = on_all_experts(experts, x, matrix, num_experts=8)
    units = torch.nn.functional.normalize(alone, dim=-1)
    expected = torch.einsum("ith,jth->ij", units, units)
    assert (cosine - expected).abs().max() <= off * len(x)
    wanted = torch.einsum("eth,hp->tep", alone, matrix)
    assert (projected - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_outputs_of_all_experts_are_held_for_as_many_tokens_as_have_room() -> None:
    assert sample_room(8, 1024, 8 * 3 * 1024 * 256) == (256, 4)
    assert sample_room(128, 2048, 128 * 3 * 2048 * 768) == (128, 2), "Qwen3-30B"
    assert sample_room(256, 7168, 256 * 3 * 7168 * 2048) == (256, 2), "an eighth of a byte for a weight"
    assert sample_room(1024, 4096, 0) == (32, 2), "never fewer than are summed together"


def test_the_default_sample_is_sized_by_its_cost() -> None:
    assert sample_size(65536, top_k=8, num_experts=128) == 2048
    assert sample_size(2048, top_k=8, num_experts=128) == 512
    assert sample_size(1024, top_k=1, num_experts=128) == 256
    assert sample_size(65536, top_k=8, num_experts=256) == 2048
