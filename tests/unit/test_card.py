"""The model card of an output: metadata that the hub reads, carried over with care; it is no part of the manifest."""

from __future__ import annotations

import json

import pytest
import yaml
from tiny import make_dense

from moeconv.checkpoint.card import parent_names, source_metadata
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
    assert meta["license"] == "mit" and meta["language"] == ["en"] and meta["datasets"] == ["x"]
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


def test_a_local_directory_is_named_by_its_config_or_its_card(tmp_path, cli):
    dense = make_dense(tmp_path / "dense")
    assert parent_names(Checkpoint(dense)) == []
    (dense / "README.md").write_text("---\nbase_model: someone/base\ntags: [code, moe]\n---\n")
    assert parent_names(Checkpoint(dense)) == ["someone/base"]
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(config | {"_name_or_path": "someone/dense"}))
    assert parent_names(Checkpoint(dense)) == ["someone/dense"]
    assert cli("upcycle", dense, tmp_path / "moe", "--experts", "4", "--no-check").code == 0
    meta, text = card_of(tmp_path / "moe")
    assert meta["base_model"] == "someone/dense" and {"code", "upcycled"} <= set(meta["tags"])
    assert len(meta["tags"]) == len(set(meta["tags"])) and "AutoTokenizer.from_pretrained" in text
    assert cli("prune", tmp_path / "moe", tmp_path / "small", "--keep", "2").code == 0
    meta, text = card_of(tmp_path / "small")
    assert meta["base_model"] == "someone/dense" and "- 2 of 4 experts per layer are left, chosen by aimer." in text


def test_siblings_are_a_list_of_base_models(tmp_path, cli):
    paths = [make_dense(tmp_path / name, seed=i) for i, name in enumerate(("a", "b"))]
    for path in paths:
        (path / "README.md").write_text(f"---\nbase_model: someone/{path.name}\n---\n")
    words = [word for path in paths for word in ("--experts-from", path)]
    done = cli("upcycle", paths[0], tmp_path / "moe", "--method", "experts-from", *words, "--no-check")
    assert done.code == 0, done.err
    meta, _ = card_of(tmp_path / "moe")
    assert meta["base_model"] == ["someone/a", "someone/b"] and meta["base_model_relation"] == "merge"
