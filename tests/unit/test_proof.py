"""Proof after writing: the error of every layer, counts by role, and what a packing that is not the source's gives."""

from __future__ import annotations

import shutil

import pytest
from tiny import decode, edit_json, encode, make_moe, read_tensors, write_shards

from moeconv.errors import CheckError, InputError
from moeconv.families.model import open_model
from moeconv.plan.execute import execute
from moeconv.quantize.planner import plan_quantize
from moeconv.quantize.proof import prove_packing

FORMATS = [
    {},
    {"bits": 8, "group_size": "channel"},
    {"format": "bitsandbytes"},
    {"format": "bitsandbytes", "double_quant": True},
    {"format": "bitsandbytes", "scheme": "int8"},
]


def written(tmp_path, **parameters):
    model = open_model(make_moe(tmp_path / "m", "qwen2_moe", hidden=64, intermediate=128, layers=3, shards=2))
    plan = plan_quantize(model, **parameters)
    execute(plan, source=model.checkpoint, out=tmp_path / "out")
    return model, plan, tmp_path / "out"


@pytest.mark.parametrize("parameters", FORMATS)
@pytest.mark.parametrize("scope", ["experts", "experts+shared", "all-linear"])
def test_every_layer_has_its_error_and_every_role_its_count(tmp_path, parameters, scope):
    model, plan, out = written(tmp_path, scope=scope, **parameters)
    found = prove_packing(plan, model, out)
    counts = {"expert": 3 * 4 * 3, "shared": 3 * 3, "attention": 3 * 4}
    groups = {"experts": 1, "experts+shared": 2, "all-linear": 3}[scope]
    assert found["counted"] == dict(list(counts.items())[:groups])
    rows = found["error"]["layers"]
    assert [row["layer"] for row in rows] == [0, 1, 2]
    low, high = (0.003, 0.02) if plan.block["bits_by_layer"]["0"] == 8 else (0.06, 0.14)
    assert all(low < row["relative_rms"] <= row["max"] < high for row in rows)
    assert found["error"]["relative_rms"]["max"] == max(row["max"] for row in rows)


def test_codes_that_are_not_the_sources_fail(tmp_path):
    model, plan, out = written(tmp_path)
    tensors = read_tensors(out)
    ours = [name for name in tensors if name.endswith("experts.0.gate_proj.weight_packed")]
    for a, b in zip(ours, ours[1:] + ours[:1], strict=True):  # every layer gets another's codes
        tensors[a] = (*tensors[a][:2], read_tensors(out)[b][2])
    write_shards(out, tensors)
    with pytest.raises(CheckError, match="relative error"):
        prove_packing(plan, model, out)


def test_a_role_that_was_skipped_fails(tmp_path):
    model, _, out = written(tmp_path)
    more = plan_quantize(model, scope="experts+shared")
    with pytest.raises(CheckError, match=r"packed weights on disk are \{'expert': 36\}"):
        prove_packing(more, model, out)


@pytest.mark.parametrize("parameters", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(tmp_path, parameters, value):
    path = make_moe(tmp_path / "m", hidden=64, intermediate=128)
    tensors = read_tensors(path)
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    dtype, shape, data = tensors[name]
    weight = decode(data, dtype, shape).copy()
    weight[3, 5] = value
    if value == value:  # infinity survives the rounding of the test's encoder, NaN by its bits
        tensors[name] = (dtype, shape, encode(weight, dtype))
    else:
        flat = bytearray(data)
        flat[10:12] = b"\xc0\x7f"
        tensors[name] = (dtype, shape, bytes(flat))
    write_shards(path, tensors)
    model = open_model(path)
    with pytest.raises(InputError, match=r"experts\.2\.w3"):
        execute(plan_quantize(model, **parameters), source=model.checkpoint, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_config_of_another_scheme_does_not_pass_as_proof(tmp_path):
    model, plan, out = written(tmp_path)
    shutil.copytree(out, tmp_path / "copy")
    edit_json(tmp_path / "copy" / "config.json", drop=["quantization_config"])
    with pytest.raises((CheckError, InputError)):
        prove_packing(plan, model, tmp_path / "copy")
