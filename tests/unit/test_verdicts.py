"""verify gives a verdict on outputs that do not open, and the JSON of every command that looks at a model continues a
pipe."""

from __future__ import annotations

import io
import re
import sys

import pytest

from moeconv.demo import DEMO_DATA
from tests.tiny import make_moe


@pytest.fixture
def packed(cli, tmp_path):
    moe = make_moe(tmp_path / "moe", hidden=64, intermediate=128)
    assert cli("quantize", moe, tmp_path / "packed", "--no-check", "-q").code == 0
    return tmp_path / "packed"


def test_a_truncated_shard(cli, packed):
    shard = packed / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    found = cli("verify", packed, "--json")
    assert found.code == 5 and found.json["ok"] is False and found.json["path"] == str(packed)
    first, second = found.json["problems"]
    assert "tensors end at byte" in first and second.startswith("model.safetensors has changed since it was written")


def test_a_missing_shard(cli, packed):
    (packed / "model.safetensors").unlink()
    found = cli("verify", packed, "--json")
    assert found.code == 5 and "model.safetensors is missing" in found.json["problems"]


def test_without_a_manifest_a_damaged_checkpoint_is_rejected(cli, packed):
    (packed / "model.safetensors").unlink()
    (packed / "moeconv_manifest.json").unlink()
    assert cli("verify", packed).code == 3


@pytest.mark.slow
def test_gguf(cli, tmp_path):
    assert cli("upcycle", DEMO_DATA / "model", tmp_path / "moe", "--no-check", "-q").code == 0
    assert cli("quantize", tmp_path / "moe", tmp_path / "g", "--format", "gguf", "--scheme", "q8_0", "-q").code == 0
    found = cli("verify", tmp_path / "g", "--json")
    assert found.code == 0 and found.json["ok"] and "not their structure" in found.json["warnings"][0]
    assert re.search(r"checked +1 shard, ", cli("verify", tmp_path / "g").out)
    assert cli("verify", tmp_path / "g", "--load").code == 3  # it is not loaded, so that it cannot be vouched for
    file = tmp_path / "g" / "model.gguf"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert "model.gguf has changed" in cli("verify", tmp_path / "g", "--json").json["problems"][0]


@pytest.mark.slow
def test_commands_that_look_at_a_model_do_not_end_a_pipe(cli, monkeypatch, tmp_path):
    model = DEMO_DATA / "model"
    text = tmp_path / "text.txt"
    text.write_text("one two three " * 200)
    for words in (
        ("inspect", model), ("verify", model),
        ("evaluate", model, "--data", text, "--tokens", "256"),
    ):  # fmt: skip
        said = cli(*words, "--json").out
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said.encode())))
        assert cli("inspect", "-", "--json").json["path"] == str(model)
