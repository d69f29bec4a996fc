"""The model card of an output: metadata that the hub reads, carried over with care; it is no part of the manifest."""

from __future__ import annotations

import json

import pytest
import yaml
from tiny import make_dense

from moeconv.checkpoint.card import source_metadata
from moeconv.checkpoint.paths import hub_name
from moeconv.checkpoint.reader import Checkpoint
from moeconv.report.history import command_line


def card_of(out):
    _, meta, text = (out / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(meta), text


@pytest.mark.slow
def test_a_card_carries_licence_and_base_model_through_a_chain_of_steps(tmp_path, cli):
    source = make_dense(tmp_path / "models--someone--tiny" / "snapshots" / "1", "llama")
    (source / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\ndatasets: [x]\n---\n# theirs\n")
    moe, packed = tmp_path / "moe", tmp_path / "packed"
    assert cli("upcycle", source, moe, "--experts", "4", "--json").code == 0
    meta, text = card_of(moe)
    assert meta["base_model"] == "someone/tiny" and meta["base_model_relation"] == "finetune"
    assert meta["license"] == "mit" and meta["language"] == ["en"] and "datasets" not in meta
    assert "`moeconv upcycle --method copy --experts 4 --top-k 2`" in text
    assert "promised exact" in text
    assert cli("quantize", moe, packed, "--format", "bitsandbytes", "--json").code == 0
    meta, text = card_of(packed)
    assert meta["base_model"] == "someone/tiny" and meta["license"] == "mit"
    assert {"upcycled", "quantized"} <= set(meta["tags"])
    assert "import moeconv.hf" in text and text.count("| `moeconv ") == 2


def test_a_card_may_be_edited_and_the_checkpoint_stays_whole(tmp_path, cli):
    source = make_dense(tmp_path / "dense", "llama")
    assert cli("upcycle", source, tmp_path / "moe", "--no-check", "--json").code == 0
    manifest = json.loads((tmp_path / "moe" / "moeconv_manifest.json").read_text())
    assert "README.md" not in manifest["files"]
    (tmp_path / "moe" / "README.md").write_text("mine")
    assert cli("verify", tmp_path / "moe", "--json").json["ok"] is True


@pytest.mark.slow
def test_a_strangers_card_gives_words_and_nothing_else(tmp_path):
    source = make_dense(tmp_path / "dense", "llama")
    hostile = {"license": "a\x1b[31m", "base_model": {"deep": 1}, "language": ["en", 3, "x" * 500]}
    for meta in (yaml.safe_dump(hostile), "!!python/object/apply:os.system [id]", "[" * 5000, "&a [*a, *a]", "\0"):
        (source / "README.md").write_text(f"---\n{meta}\n---\n")
        found = source_metadata(Checkpoint(source))
        assert found in ({}, {"language": ["en"]})
    (source / "README.md").unlink()
    (source / "README.md").mkdir()
    assert source_metadata(Checkpoint(source)) == {}
    assert hub_name(source) is None


def test_a_step_reads_as_the_command_that_makes_it():
    step = {"command": "tune", "parameters": {"made_with": {
        "objective": "distill", "train": ["router", "experts"], "steps": 9, "teacher": "ab" * 32,
        "learning_rate": {"router": 0.1}, "straight_through": False, "balance": 0.01}}}  # fmt: skip
    assert command_line(step) == (
        "moeconv tune --objective distill --train router,experts --steps 9 --teacher abababababab --no-straight-through"
    )
    assert command_line(
        {"command": "prune", "parameters": {"criterion": "reap", "stats": "/home/me/s.st", "keep": 4}}
    ) == ("moeconv prune --criterion reap --keep 4 --stats s.st")
    assert command_line({"command": "x\n", "parameters": 3}) == "moeconv x\\n"
