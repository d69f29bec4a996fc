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
    assert meta["base_model"] == "someone/dense" and "- 2 of 4 experts per layer remain, chosen by aimer." in text


def test_siblings_are_a_list_of_base_models(tmp_path, cli):
    paths = [make_dense(tmp_path / name, seed=i) for i, name in enumerate(("a", "b"))]
    for path in paths:
        (path / "README.md").write_text(f"---\nbase_model: someone/{path.name}\n---\n")
    words = [word for path in paths for word in ("--experts-from", path)]
    done = cli("upcycle", paths[0], tmp_path / "moe", "--method", "experts-from", *words, "--no-check")
    assert done.code == 0, done.err
    meta, _ = card_of(tmp_path / "moe")
    assert meta["base_model"] == ["someone/a", "someone/b"] and meta["base_model_relation"] == "merge"


def answers(path, name="quiz", **metrics):
    """The JSON of `moeconv evaluate --tasks`, as far as a card shows it."""
    figures = {key: {"value": value, "stderr": 0.125} for key, value in metrics.items()}
    task = {"name": name, "kind": "multiple_choice", "questions": 8, "sha256": "ab" * 32, "metrics": figures}
    return {"command": "evaluate", "path": str(path), "tasks": {"results": [task]}}


def report_on(cli, model, *results):
    """`moeconv report MODEL --card` with the results in files."""
    files = []
    for number, result in enumerate(results):
        files += ["--results", model.parent / f"result{number}.json"]
        files[-1].write_text(json.dumps(result))
    return cli("report", model, model.parent / "page.html", *files, "--card", "--overwrite", "--json")


def test_answers_to_tasks_are_the_model_index_of_the_card(tmp_path, cli):
    from huggingface_hub import ModelCard

    model = make_dense(tmp_path / "dense")
    meta = "license: mit  # as the base\nmodel-index:\n- name: old\n  results: []\ntags:\n- moe\n"
    (model / "README.md").write_text(f"---\n{meta}---\n# mine\n\nwords\n")
    done = report_on(cli, model, answers(model, accuracy=0.5, accuracy_per_char=0.625), answers(tmp_path, accuracy=0.0))
    assert done.code == 0 and done.json["card"] == str(model / "README.md"), done.out
    assert report_on(cli, model, answers(model, "a b/c", exact_match=0.25)).code == 0
    written = (model / "README.md").read_text()
    assert written.startswith("---\nlicense: mit  # as the base\ntags:\n- moe\n") and "# mine\n\nwords\n" in written
    assert written.count("## Results on tasks") == 1 and "| quiz | 8 | accuracy | 0.5000 | 0.1250 |" in written
    card = ModelCard(written).data
    assert card.model_name == "dense" and card.tags == ["moe"]
    found = [(r.dataset_type, r.dataset_name, r.metric_type, r.metric_value) for r in card.eval_results]
    assert found == [
        ("quiz", "quiz", "accuracy", 0.5), ("quiz", "quiz", "acc_norm", 0.625), ("a-b-c", "a b/c", "exact_match", 0.25),
    ]  # fmt: skip
    assert report_on(cli, model, answers(model, accuracy=0.75, accuracy_per_char=1.0)).code == 0  # measured again
    again = ModelCard((model / "README.md").read_text()).data.eval_results
    assert sorted(r.metric_value for r in again) == [0.25, 0.75, 1.0]


def test_a_card_that_is_missing_is_made_and_one_that_cannot_be_read_stays(tmp_path, cli):
    from huggingface_hub import ModelCard

    model = make_dense(tmp_path / "dense")
    assert report_on(cli, model, answers(model, accuracy=0.5)).code == 0
    assert ModelCard((model / "README.md").read_text()).data.eval_results[0].metric_value == 0.5
    page = (tmp_path / "page.html").read_bytes()
    for text in (b"---\na: [\n---\n", b"---\n- a\n---\n", b"\xff"):
        (model / "README.md").write_bytes(text)
        done = report_on(cli, model, answers(model, accuracy=1.0))
        assert done.code == 3 and "--card" in done.json["error"]["message"], done.out
        assert (model / "README.md").read_bytes() == text and (tmp_path / "page.html").read_bytes() == page
    (model / "README.md").unlink()
    done = report_on(cli, model, answers(tmp_path / "other", accuracy=1.0))
    assert done.code == 3 and "no task results" in done.json["error"]["message"] and not (model / "README.md").exists()
    cached = make_dense(tmp_path / "models--someone--tiny" / "snapshots" / "1")
    done = report_on(cli, cached, answers(cached, accuracy=1.0))
    assert done.code == 3 and "hub's cache" in done.json["error"]["message"]
