"""quantize --requantize in one pass: the bytes of decoding first and packing then, and nothing written on the way."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from words import add_tokenizer, text

from moeconv.data.windows import Source, TokenData
from moeconv.families.model import open_model
from moeconv.plan.execute import execute
from moeconv.plan.kernels.pack import relative_rms
from moeconv.quantize.decode import plan_decode
from moeconv.quantize.step import plan_packing
from moeconv.recipe.read import asked
from moeconv.tensors import decode_weight
from tests.contract.stock import MOE_CASES, load, save_stock
from tests.contract.test_multimodal import _rewrite, _stacked, _tensors
from tests.unit.test_stored_floats import MAKERS

pytestmark = pytest.mark.usefixtures("one_thread")

INT8 = ("--format", "bitsandbytes", "--scheme", "int8")


@pytest.fixture
def make(tmp_path, cli):
    """`make("mxfp4")`: a quantized checkpoint of some kind."""

    def source(kind: str) -> Path:
        if kind in MAKERS:
            return MAKERS[kind](tmp_path / "source")
        family = {"int8": "qwen3_moe", "int8-stacked": "granitemoe"}[kind]
        plain = save_stock(tmp_path / "plain16", *MOE_CASES[family], dtype=torch.bfloat16)
        assert cli("quantize", plain, tmp_path / "source", *INT8, "--json").code == 0
        return tmp_path / "source"

    return source


@pytest.mark.slow(keep=3)
@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("fp8", ()),
        ("fp8", ("--format", "bitsandbytes", "--scope", "all-linear")),
        ("fp8-channel", ("--method", "mse")),
        ("fp8-shared", ("--scope", "experts+shared", "--bits", 8)),
        ("mxfp4", ("--format", "bitsandbytes")),
        ("mxfp4", INT8),
        ("int8", ("--group-size", 32)),
        ("gptq", ()),
        ("gptq", ("--format", "bitsandbytes", "--scope", "all-linear")),
        ("awq", ()),
        ("awq", ("--format", "bitsandbytes")),
        ("int8-stacked", ("--format", "bitsandbytes", "--double-quant")),
    ],
)
def test_same_bytes_as_decoded_and_packed(tmp_path, cli, make, monkeypatch, kind, flags):
    source = make(kind)
    model = open_model(source)
    execute(plan_decode(model), source=model.checkpoint, out=tmp_path / "plain")
    two = cli("quantize", tmp_path / "plain", tmp_path / "two", *flags, "--json")
    assert two.code == 0, two.out
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp" / "gone"))  # no room for a temporary file
    promised = cli("quantize", source, tmp_path / "one", "--requantize", *flags, "--dry-run", "--json").json
    done = cli("quantize", source, tmp_path / "one", "--requantize", *flags, "--json")
    assert done.code == 0, done.out
    assert promised["bytes"] == done.json["bytes"] and promised["changed"] == done.json["changed"]
    assert tiny.read_tensors(tmp_path / "one") == tiny.read_tensors(tmp_path / "two")
    assert (tmp_path / "one" / "config.json").read_text() == (tmp_path / "two" / "config.json").read_text()
    # what the check decodes is compared with the same numbers either way
    assert done.json["quantize"]["error"] == two.json["quantize"]["error"]
    assert done.json["quantize"]["counted"] == two.json["quantize"]["counted"]
    if kind != "mxfp4" and "bitsandbytes" not in flags:
        load(tmp_path / "one", dtype=torch.bfloat16)


def test_an_expert_of_a_stack_is_decoded_alone(make):
    model = open_model(make("mxfp4"))
    packing = asked("quantize", {"format": "bitsandbytes", "requantize": True}, "", "")
    plan = plan_packing(model, packing).plan
    for item in plan.items():
        if item.kernel == "chain":
            part = sum(ref.nbytes for ref in item.inputs)
            whole = sum(model.checkpoint.tensors[ref.tensor].nbytes for ref in item.inputs)
            assert part * model.num_experts == whole
            assert item.held < whole * 4 * 2 / model.num_experts


def test_parts_of_it_complete(tmp_path, cli, make, left_over):
    source, size = make("fp8"), ("--shard-size", "60KB", "--json")
    assert cli("quantize", source, tmp_path / "single", "--requantize", *size).code == 0
    parts = [cli("quantize", source, tmp_path / "out", "--requantize", *size, "--part", f"{i}/3") for i in (1, 2, 0)]
    assert [part.json["complete"] for part in parts] == [False, False, True]
    assert tiny.hashes(tmp_path / "out") == tiny.hashes(tmp_path / "single") and left_over(tmp_path) == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp8", "fp8-shared"])
def test_gptq_works_from_the_decoded_weights(tmp_path, cli, make, kind):
    source = add_tokenizer(make(kind))
    (tmp_path / "text").write_text(text(600))
    flags = ("--requantize", "--method", "gptq", "--data", tmp_path / "text", "--seq-len", 16, "--json")
    done = cli("quantize", source, tmp_path / "out", *flags)
    assert done.code == 0, done.out
    rows = done.json["quantize"]["error"]["output"]["layers"]
    assert rows and all(row["output_rms"] < row["output_rms_rtn"] for row in rows)
    assert done.json["quantize"]["error"]["relative_rms"]["max"] < 0.4
    before, after = open_model(source), open_model(tmp_path / "out")
    for layer in after.moe_layers:
        name = after.expert_name("down", layer=layer, expert=1)
        assert relative_rms(decode_weight(before, name).float(), decode_weight(after, name).float()) < 0.4


@pytest.mark.slow
def test_gptq_takes_stacked_experts_apart_in_the_plan(tmp_path, cli, monkeypatch):
    """The same codes as of a checkpoint whose experts lie apart, and nothing written on the way."""
    apart = save_stock(tmp_path / "apart", *MOE_CASES["qwen3_5_moe"], dtype=torch.bfloat16)
    tensors, stacked = _tensors(apart), tmp_path / "stacked"
    for layer in range(3):
        _stacked(tensors, f"model.layers.{layer}.mlp.", 8)
    shutil.copytree(apart, stacked)
    _rewrite(stacked, tensors)
    assert open_model(stacked).packed_experts and not open_model(apart).packed_experts
    (tmp_path / "text").write_text("its tokens are those below")
    windows = np.random.default_rng(0).integers(3, 120, (32, 16))
    read = TokenData(windows, np.zeros(32, np.int64), (Source("text", "0" * 64, windows.size),))
    monkeypatch.setattr("moeconv.quantize.gptq.run.load_tokens", lambda *_, **__: read)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    flags = ("--method", "gptq", "--data", tmp_path / "text", "--seq-len", 16, "--json")
    for source in (apart, stacked):
        done = cli("quantize", source, tmp_path / f"{source.name}-out", *flags)
        assert done.code == 0, done.out
    one, two = (tiny.read_tensors(tmp_path / f"{source.name}-out") for source in (apart, stacked))
    assert one == two
