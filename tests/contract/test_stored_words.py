"""Sources in the layouts of GPTQ and AWQ: decoded bit for bit as the formats are defined, evaluated as what they decode
to, and refused by name where a part is missing or wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from words import add_tokenizer, text

from moeconv.families.model import open_model
from moeconv.plan.execute import execute
from moeconv.plan.kernels.decode import decode_parts
from moeconv.quantize.decode import plan_decode
from moeconv.tensors import decode_weight
from tests import tiny
from tests.stored_words import make_awq, make_gptq, pack_awq, pack_gptq, plain_awq, plain_gptq

pytestmark = pytest.mark.usefixtures("one_thread")
EXPERT = "model.layers.1.mlp.experts.2.gate_proj"


def _decoded(parts: dict[str, torch.Tensor], form: str, bits: int, group: int | None, shape: torch.Size):
    how = {"form": form, "bits": bits, "grid": [1, group], "shape": list(shape)}
    return decode_parts(parts, name="x.weight", how=how)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq_is_decoded_as_it_is_defined(bits: int, version: int) -> None:
    weight = torch.randn(64, 160, generator=torch.Generator().manual_seed(bits))
    form, order = {1: "gptq", 2: "gptq-v2"}[version], np.random.default_rng(0)
    for group in (32, 48, 160):  # also with a last group that is shorter
        of = np.arange(160) // group
        for g_idx in (of, order.permutation(of)):
            parts = pack_gptq(weight, bits=bits, group=group, version=version, g_idx=g_idx)
            for dtype in (torch.float16, torch.bfloat16):
                parts["scales"] = parts["scales"].to(dtype)
                found = _decoded(parts, form, bits, group if group < 160 else None, weight.shape)
                assert torch.equal(found, plain_gptq(parts, bits=bits, version=version))
        parts = pack_gptq(weight, bits=bits, group=group, version=version, g_idx=of)
        whole = _decoded(parts, form, bits, group, weight.shape)
        del parts["g_idx"]
        assert torch.equal(_decoded(parts, form, bits, group, weight.shape), whole)
    assert float((whole - weight).abs().max()) < 8 / ((1 << bits) - 1)


def test_awq_is_decoded_as_it_is_defined() -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    for group in (32, 96):
        parts = pack_awq(weight, group=group)
        found = _decoded(parts, "awq", 4, group if group < 96 else None, weight.shape)
        assert torch.equal(found, plain_awq(parts, group=group))
        assert float((found - weight).abs().max()) < 8 / 15
        stored = {f"x.{part}": tensor for part, tensor in parts.items()}
        other = AutoAWQConverter(group_size=group).process(stored)  # the same numbers, as another library reads them
        levels = unpack_from_int32(other["x.weight_packed"], 4, weight.shape)
        zeros = unpack_from_int32(other["x.weight_zero_point"], 4, other["x.weight_scale"].shape, packed_dim=0)
        of, scales = torch.arange(96) // group, other["x.weight_scale"]
        assert torch.equal(found, (levels.to(scales.dtype) - zeros.to(scales.dtype)[:, of]) * scales[:, of])


CASES = {
    "gptq-mixtral": lambda path: make_gptq(path, "mixtral", bits=3),
    "gptq-qwen3_moe": lambda path: make_gptq(path, "qwen3_moe", bits=8, version=2, ordered=False),
    "awq-qwen3_moe": lambda path: make_awq(path, "qwen3_moe"),
}


@pytest.mark.parametrize("case", CASES)
def test_evaluate_equals_the_decoded_model(tmp_path: Path, cli, case: str) -> None:
    path = add_tokenizer(CASES[case](tmp_path / "stored"))
    model = open_model(path)
    execute(plan_decode(model), source=model.checkpoint, out=tmp_path / "plain")
    add_tokenizer(tmp_path / "plain")
    (tmp_path / "text").write_text(text(300))
    found = [
        cli("evaluate", source, "--data", tmp_path / "text", "--seq-len", 16, "--json")
        for source in (path, tmp_path / "plain")
    ]
    assert found[0].code == 0, found[0].out
    assert math.isfinite(found[0].json["loss"]) and found[0].json["loss"] == found[1].json["loss"]
    assert cli("verify", path, "--json").code == 0
    for flags in ((), ("--format", "bitsandbytes")):
        one, two = (tmp_path / f"{name}{len(flags)}" for name in ("one", "two"))
        assert cli("quantize", path, one, "--requantize", *flags, "--json").code == 0
        assert cli("quantize", tmp_path / "plain", two, *flags, "--json").code == 0
        assert tiny.read_tensors(one) == tiny.read_tensors(two)


def _edit(path: Path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def _set(part: str, value) -> object:
    return lambda tensors: tensors.update({f"{EXPERT}.{part}": value(tensors[f"{EXPERT}.{part}"])})


def _high(g_idx: torch.Tensor) -> torch.Tensor:
    return torch.cat([g_idx[:-1], torch.tensor([int(g_idx.max()) + 1], dtype=torch.int32)])


DAMAGED = {
    "group": (make_gptq, _set("g_idx", _high), "g_idx names the groups 0 to"),
    "negative group": (make_gptq, _set("g_idx", lambda t: -t), "g_idx names the groups -"),
    "no groups": (make_gptq, lambda tensors: tensors.pop(f"{EXPERT}.g_idx"), f"{EXPERT}.g_idx' is missing"),
    "zero point 0": (make_gptq, _set("qzeros", lambda t: t | 15), "qzeros has the code 15"),
    "zero points": (make_gptq, _set("qzeros", lambda t: t[:1].contiguous()), f"{EXPERT}.qzeros' is I32 [1, "),
    "scales": (make_gptq, lambda tensors: tensors.pop(f"{EXPERT}.scales"), f"{EXPERT}.scales' is missing"),
    "codes": (make_gptq, lambda tensors: tensors.pop(f"{EXPERT}.qweight"), "is missing"),
    "awq zero points": (
        lambda path: make_awq(path, "qwen3_moe"),
        _set("qzeros", lambda t: t.T.contiguous()),
        f"{EXPERT}.qzeros' is I32",
    ),
    "awq scales": (
        lambda path: make_awq(path, "qwen3_moe"),
        lambda tensors: tensors.pop(f"{EXPERT}.scales"),
        f"{EXPERT}.scales' is missing",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_part_is_named(tmp_path: Path, cli, left_over, damage: str) -> None:
    make, change, says = DAMAGED[damage]
    path = make(tmp_path / "stored")
    _edit(path, change)
    refused = cli("quantize", path, tmp_path / "out", "--requantize", "--json")
    assert refused.code == 3, refused.out
    assert says in refused.json["error"]["message"] and EXPERT in refused.json["error"]["message"]
    assert left_over(tmp_path) == []
    if "group" in damage:
        checked = cli("verify", path, "--json")
        assert checked.code == 5 or checked.code == 3
        assert EXPERT in str(checked.json)


@pytest.mark.parametrize(
    ("make", "changed", "says"),
    [
        (make_gptq, {"checkpoint_format": "marlin"}, "GPTQ in the layout marlin"),
        (make_gptq, {"bits": 5}, "GPTQ with 5 bits"),
        (make_gptq, {"group_size": 0}, "groups of 0"),
        (make_gptq, {"dynamic": {"-:.*experts": {}}}, "config.json makes it a plain one"),
        (make_gptq, {"dynamic": [1]}, "dynamic must be an object"),
        (make_gptq, {"dynamic": {"+:.*experts": {"bits": 8}}}, "is I32"),
        (make_awq, {"version": "gemv"}, "AWQ in the layout gemv"),
        (make_awq, {"zero_point": False}, "without zero points"),
        (make_awq, {"bits": 8}, "AWQ with 8 bits"),
        (make_awq, {"modules_to_not_convert": ["w1"]}, "config.json makes it a plain one"),
        (make_awq, {"modules_to_not_convert": "gate"}, "must be a list of names"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, cli, make, changed: dict, says: str) -> None:
    path = make(tmp_path / "stored")
    said = json.loads((path / "config.json").read_text())["quantization_config"]
    tiny.edit_json(path / "config.json", quantization_config=said | changed)
    refused = cli("quantize", path, tmp_path / "out", "--requantize", "--dry-run", "--json")
    assert refused.code == 3 and says in refused.json["error"]["message"], refused.out


def test_dynamic_settings_are_those_of_the_module(tmp_path: Path) -> None:
    """As GPTQModel writes a model whose modules have different widths."""
    path = make_gptq(tmp_path / "stored", ordered=False)
    weight = decode_weight(open_model(path), f"{EXPERT}.weight").float()
    parts = pack_gptq(weight, bits=8, group=16, version=1)
    _edit(path, lambda tensors: tensors.update({f"{EXPERT}.{part}": tensor for part, tensor in parts.items()}))
    said = json.loads((path / "config.json").read_text())["quantization_config"]
    dynamic = {"-:lm_head": {}, r"+:.*\.1\.mlp\.experts\.2\.gate_proj": {"bits": 8, "group_size": 16}}
    tiny.edit_json(path / "config.json", quantization_config=said | {"dynamic": dynamic})
    model = open_model(path)
    assert torch.equal(decode_weight(model, f"{EXPERT}.weight"), plain_gptq(parts, bits=8, version=1))
    assert model.stored["model.layers.1.mlp.experts.1.gate_proj.weight"].encoding.bits == 4
