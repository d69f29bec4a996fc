"""Proof after writing: the error of every layer, counts by role, and what a packing that is not the source's gives."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from tiny import decode, edit_json, encode, make_moe, packable, read_tensors, write_shards

from moeconv.errors import CheckError, InputError
from moeconv.families.model import open_model
from moeconv.families.rows.mistral import MIXTRAL
from moeconv.plan.execute import execute
from moeconv.quantize.formats import FORMATS
from moeconv.quantize.planner import plan_quantize
from moeconv.quantize.proof import prove_packing

KINDS = [
    {"format": f.name, "scheme": info.name} | ({"double_quant": True} if nested else {})
    for f in FORMATS.values()
    if f.takes(MIXTRAL) and f.shard is None
    for info in f.schemes
    if not info.inputs  # those are measured on text
    for nested in (False, True)[: 1 + info.nests]
]
KINDS += [
    {"format": f.name, "scheme": info.name, "group_size": "channel"}
    for f in FORMATS.values()
    for info in f.schemes
    if None in info.groups
]


def written(tmp_path, **parameters):
    format = FORMATS[parameters.get("format", "compressed-tensors")]
    sizes = packable(format.scheme(parameters.get("scheme", format.names[0])), hidden=64, intermediate=128)
    model = open_model(make_moe(tmp_path / "m", "qwen2_moe", layers=3, shards=2, **sizes))
    plan = plan_quantize(model, **parameters)
    execute(plan, source=model.checkpoint, out=tmp_path / "out")
    return model, plan, tmp_path / "out"


@pytest.mark.parametrize("parameters", KINDS)
@pytest.mark.parametrize("scope", ["experts", "experts+shared", "all-linear"])
def test_every_layer_has_its_error_and_every_role_its_count(tmp_path, parameters, scope):
    model, plan, out = written(tmp_path, scope=scope, **parameters)
    found = prove_packing(plan, model, out)
    counts = {"expert": 3 * 4 * 3, "shared": 3 * 3, "attention": 3 * 4}
    groups = {"experts": 1, "experts+shared": 2, "all-linear": 3}[scope]
    assert found["counted"] == dict(list(counts.items())[:groups])
    rows = found["error"]["layers"]
    assert [row["layer"] for row in rows] == [0, 1, 2]
    info = FORMATS[parameters["format"]].scheme(parameters["scheme"])
    assert all(info.limit / 20 < row["relative_rms"] <= row["max"] < info.limit / 2 for row in rows)
    if expected := info.errors.get(plan.block["group_size"]):  # of Gaussian weights
        assert all(row["relative_rms"] == pytest.approx(expected**0.5, rel=0.4) for row in rows)
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
    with pytest.raises(CheckError, match=r"the packed weights on disk are \{'expert': 36\}"):
        prove_packing(more, model, out)


@pytest.mark.parametrize("parameters", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(tmp_path, parameters, value):
    info = FORMATS[parameters["format"]].scheme(parameters["scheme"])
    path = make_moe(tmp_path / "m", **packable(info, hidden=64, intermediate=128))
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


def test_a_format_that_does_not_name_the_dtype_of_its_codes_fails_its_proof(tmp_path, monkeypatch):
    """Nothing that was written counts as packed then: that is no proof."""
    name, base = next(iter(FORMATS.items()))
    wrong = replace(base, schemes=tuple(replace(info, codes="U16") for info in base.schemes))
    monkeypatch.setattr(FORMATS, "_records", {**FORMATS, name: wrong})
    model, plan, out = written(tmp_path)
    with pytest.raises(CheckError, match="and the plan has"):
        prove_packing(plan, model, out)
    with pytest.raises(CheckError, match="the plan packs no weight"):
        unpacked = replace(plan, shards=())
        monkeypatch.setattr("moeconv.quantize.proof._count", lambda *_: {})
        prove_packing(unpacked, model, out)
