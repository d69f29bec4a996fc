"""No output replaces what a command reads, whatever option names it, nor what moeconv cannot know to be its own."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import hashes, make_dense, make_moe

from moeconv import options
from moeconv.checkpoint.artifact import artifact_metadata
from moeconv.checkpoint.guard import guard
from moeconv.checkpoint.hub import cache as cache_of_the_hub
from moeconv.checkpoint.target import check_target, strangers
from moeconv.checkpoint.writer import writing_artifact
from moeconv.cli.commands import VERBS, Verb
from moeconv.errors import OutputError
from moeconv.options import flag_of
from moeconv.plan.meter import SilentMeter
from moeconv.prune.curve import is_curve
from moeconv.recipe.read import DEMO_DATA, GROUPS
from moeconv.recipe.run import run_recipe

WRITERS = {verb.name: verb for verb in VERBS if any(p.writes for p in verb.positionals)}
# options that hold words, none of which is a path (`model` of families is a name); an option that holds one says so in
# `reads`
WORDS = {
    "shard_size", "part", "max_memory", "max_device_memory", "text_field", "to", "layers", "shared_experts",
    "max_bytes", "group_size", "among", "split_size", "file_name", "target", "train", "protect", "title", "set",
    "model",
}  # fmt: skip
WRITES = {"out", "imatrix"}  # options that name what is written, of `run` and of `calibrate`


def fields_of(verb: Verb) -> Iterator[Any]:
    return (f for group in verb.groups for f in dataclasses.fields(group))


def test_an_option_that_holds_a_path_says_so():
    groups = [g for n, g in vars(options).items() if n.endswith("Options") and dataclasses.is_dataclass(g)]
    texts = set()
    for group in groups:
        hints = typing.get_type_hints(group)
        for f in dataclasses.fields(group):
            is_text = hints[f.name] in (str, str | None, tuple[str, ...])
            assert is_text or not f.metadata["reads"], f.name
            texts |= {f.name} if is_text and not f.metadata["choices"] and not f.metadata["reads"] else set()
    assert texts == WORDS | WRITES


def test_every_command_that_writes_says_where():
    assert set(WRITERS) == {"upcycle", "tune", "prune", "quantize", "calibrate", "report", "demo", "arrange",
                            "import", "collapse"}  # fmt: skip
    # no paths, and a path that must not exist yet
    words = {("schema", "command"), ("recipes", "name"), ("recipes", "dest")}
    for verb in VERBS:
        assert all(p.reads or p.writes for p in verb.positionals if (verb.name, p.name) not in words), verb.name


# -- every path that is read, of every command -------------------------------------------------------------------------

READ = [
    (name, word)
    for name, verb in WRITERS.items()
    for word in [
        *(p.name for p in verb.positionals if p.reads),
        *(f.name for f in fields_of(verb) if f.metadata["reads"]),
    ]
]


def test_the_walk_meets_every_kind():
    assert {("tune", "teacher"), ("upcycle", "experts_from"), ("report", "results"), ("calibrate", "merge")} <= {*READ}
    assert len(READ) >= 20


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """A folder with what may be named as input: a model, a file, texts in a folder."""
    (tmp_path / "in").mkdir()
    make_dense(tmp_path / "in" / "model")
    (tmp_path / "in" / "file").write_text("precious")
    (tmp_path / "in" / "texts").mkdir()
    (tmp_path / "in" / "texts" / "a.txt").write_text("precious")
    make_dense(tmp_path / "other")
    return tmp_path


def clashes(room: Path, kind: str) -> list[tuple[str, Path]]:
    """(value of the option, OUT that touches it)."""
    model, file, texts = (room / "in" / name for name in ("model", "file", "texts"))
    by_kind = {"model": [model], "file": [file], "data": [file, texts]}
    found = []
    for path in by_kind[kind]:
        found += [(str(path), path), (str(path), room / "in")]
        found += [(str(path), path / "out")] if path.is_dir() else []
    return found + ([(f"{file}=2.5", file)] if kind == "data" else [])


@pytest.mark.slow(keep=3)
@pytest.mark.parametrize(("name", "word"), READ)
def test_no_output_touches_what_a_command_reads(name, word, room, cli):
    verb = WRITERS[name]
    kinds = {p.name: p.reads for p in verb.positionals} | {f.name: f.metadata["reads"] for f in fields_of(verb)}
    flags = {f.name for f in fields_of(verb)} & {"overwrite", "dry_run"}
    before = hashes(room)
    for at, (value, out) in enumerate(clashes(room, kinds[word])):
        places = {p.name: str(out) if p.writes else value if p.name == word else str(room / "other")
                  for p in verb.positionals}  # fmt: skip
        named = [] if word in places else [flag_of(word), value]
        alone = [[flag_of(flag)] for flag in sorted(flags)] if at == 0 else []
        for more in ([], *alone, [flag_of(flag) for flag in flags]):
            done = cli(name, *places.values(), *named, *more, "--json")
            assert done.code == 4, (value, out, more, done)
            said = done.json["error"]["message"]
            assert (word.upper() if word in places else flag_of(word)) in said, said
        assert hashes(room) == before and sorted(os.listdir(room)) == ["in", "other"]


RECIPE_READ = [
    (command, f.name, f.metadata["reads"])
    for command, groups in GROUPS.items()
    for f in (f for group in groups for f in dataclasses.fields(group))
    if f.metadata["reads"]
]


@pytest.mark.parametrize(("command", "word", "kind"), RECIPE_READ)
def test_no_output_of_a_recipe_touches_what_a_step_reads(command, word, kind, room):
    before, other = hashes(room / "in"), str(room / "other")
    for value, out in clashes(room, kind):
        reads: dict[str, Any] = {"step": command, "from": other, "with": {word: value}}
        elsewhere = reads if command in ("evaluate", "verify") else reads | {"to": str(room / "x")}
        later = {"step": "quantize", "from": other, "to": str(out), "with": {"overwrite": True}}
        recipes: list[dict[str, Any]] = [
            {"steps": [elsewhere, later]}, {"steps": [later, elsewhere]}, {"steps": [elsewhere], "report": str(out)},
        ]  # fmt: skip
        if value.partition("=")[0] == str(out):  # what an earlier step writes may be read
            del recipes[1]
        if command not in ("evaluate", "verify"):
            recipes.append({"steps": [reads | {"to": str(out)}]})
        for recipe in recipes:
            refused_recipe(room, recipe, flag_of(word))
    assert hashes(room / "in") == before


def refused_recipe(room: Path, recipe: dict[str, Any], says: str) -> None:
    (room / "recipe.yaml").write_text(json.dumps(recipe))
    for dry_run in (False, True):
        with pytest.raises(OutputError, match=re.escape(says)):
            run_recipe(str(room / "recipe.yaml"), meter=SilentMeter(), dry_run=dry_run)
    assert sorted(os.listdir(room)) == ["in", "other", "recipe.yaml"]


def test_no_output_of_a_recipe_touches_the_recipe_its_sources_or_another_output(room):
    def step(source: Path, to: Path, **parameters: Any) -> dict[str, Any]:
        return {"step": "upcycle", "from": str(source), "to": str(to), "with": parameters}

    model, x = room / "in" / "model", room / "x"
    refused_recipe(room, {"steps": [step(model, room, overwrite=True)]}, "the recipe")
    refused_recipe(room, {"steps": [step(model, x)], "report": str(room / "recipe.yaml")}, "the recipe")
    refused_recipe(room, {"steps": [step(model, x), step(x, model / "out")]}, "the source")
    refused_recipe(room, {"steps": [step(model, x), step(model, x / "y")]}, "the output")
    refused_recipe(room, {"steps": [step(model, x)], "report": str(x / "report.html")}, "the output")
    refused_recipe(room, {"steps": [step(model, x)], "evaluate": {"data": ["in/texts"], "reference": "in/model"},
                               "report": str(room / "in" / "texts" / "a.html")}, "--data")  # fmt: skip
    (room / "in" / "page.html").write_text("mine")
    refused_recipe(room, {"steps": [step(model, x)], "report": str(room / "in" / "page.html")}, "not a report file")
    refused_recipe(room, {"steps": [step(model, room / "in" / "texts", overwrite=True)]}, "a.txt")


def test_a_teacher_that_is_there_is_not_what_an_earlier_step_would_put_in_its_place(room, cli):
    """What moeconv wrote may be written again and then read: a recipe that runs a second time."""
    model, teacher = room / "in" / "model", room / "other"
    up = {"step": "upcycle", "from": str(model), "to": str(teacher), "with": {"overwrite": True, "no_check": True}}
    tune = {"step": "tune", "from": str(teacher), "to": str(room / "t"), "with": {"teacher": str(teacher)}}
    measured = {"data": ["in/texts"], "reference": str(teacher)}
    refused_recipe(room, {"steps": [up, tune]}, "--teacher")
    refused_recipe(room, {"steps": [up], "evaluate": measured}, "--reference")
    assert cli("upcycle", model, teacher, "--overwrite", "--no-check").code == 0
    (room / "recipe.yaml").write_text(json.dumps({"steps": [up], "evaluate": measured}))
    assert cli("run", room / "recipe.yaml", "--dry-run").code == 0


def test_the_demo_does_not_write_into_its_own_model(cli):
    before = hashes(DEMO_DATA)
    done = cli("demo", DEMO_DATA / "model", "--json")
    assert done.code == 4 and "lies in" in done.json["error"]["message"] and hashes(DEMO_DATA) == before


def test_a_message_shows_out_as_the_user_wrote_it(room, cli, monkeypatch):
    monkeypatch.chdir(room)
    (room / "there").mkdir()
    for write in ((), ("--dry-run",)):
        done = cli("upcycle", DEMO_DATA / "model", "there", *write, "--json")
        assert done.code == 4 and done.json["error"]["message"] == "OUT there exists already"


def test_a_path_is_the_same_under_all_its_names(room, monkeypatch):
    """By links to it, by links of a hub's cache, and relative to here."""
    model, cache = room / "in" / "model", room / "hub" / "models--a--b"
    shutil.copytree(model, cache / "blobs")
    (cache / "snapshots" / "0").mkdir(parents=True)
    for file in (cache / "blobs").iterdir():
        (cache / "snapshots" / "0" / file.name).symlink_to(Path("..", "..", "blobs", file.name))
    (room / "links").mkdir()
    for file in model.iterdir():
        (room / "links" / file.name).symlink_to(file)
    (room / "link").symlink_to(model)
    (room / "in-link").symlink_to(room / "in")
    monkeypatch.chdir(room)
    for read, outs in (
        (model, ["link", "link/out", "in-link", "in-link/model", "in/../in/model/.", ".", "/"]),
        (Path("in/model"), [model, "link", room, "in-link/model/out"]),
        (room / "link", [model, model / "out", room / "in", "link"]),
        (cache / "snapshots" / "0", [cache / "blobs", cache, cache / "out", cache / "snapshots", room / "hub"]),
        (room / "links", [model, room / "in", "links"]),
        (room / "in" / "file", ["in-link/file", "in", "in-link"]),
    ):  # fmt: skip
        for out in outs:
            for overwrite in (False, True):
                with pytest.raises(OutputError, match=r"(is|holds|lies in) --teacher"):
                    check_target(Path(os.path.abspath(out)), reads=[("--teacher", read)], overwrite=overwrite)
    with pytest.raises(OutputError, match=r"staging directory of OUT .* holds --teacher"):  # it is removed at the end
        guard(str(room / "out"), [("--teacher", str(room / ".out.moeconv" / "key" / "out"))])
    with pytest.raises(OutputError, match="lies in the hub's cache of SOURCE hf://a/b"):
        guard(os.path.join(cache_of_the_hub(), "out"), [("SOURCE", "hf://a/b")])
    check_target(
        room / "in" / "model2", reads=[("--teacher", model), ("--data", room / "in" / "file")], overwrite=False
    )


# -- what a swap would lose --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_only_a_directory_whose_loss_is_none_is_swapped(tmp_path, cli):
    source = make_dense(tmp_path / "source")
    (source / "LICENSE").write_text("terms")

    def out(name: str, *extra: str, made: str = "") -> Path:
        path = tmp_path / name
        if made == "moeconv":
            assert cli("upcycle", source, path, "--experts", 2, "--no-check").code == 0
        elif made:
            make_moe(path, shards=3 if made == "shards" else 1)
        for word in extra:
            (path / word).parent.mkdir(parents=True, exist_ok=True)
            (path / word).write_text("mine")
        path.mkdir(exist_ok=True)
        return path

    good = [
        out("empty"), out("ours", made="moeconv"), out("one", made="one"), out("shards", made="shards"),
        out("whole", "tokenizer.json", "README.md", "LICENSE", "generation_config.json", made="shards"),
        out("templates", "additional_chat_templates/a.jinja", made="one"),
    ]  # fmt: skip
    for path in good:
        assert strangers(path) == [], path
        assert cli("upcycle", source, path, "--no-check", "--overwrite", "--dry-run").code == 0
    bad = {
        "notes.txt": out("ours and a note", "notes.txt", made="moeconv"),
        "LICENSE.mine": out("ours and more", "LICENSE.mine", made="moeconv"),
        "runs/": out("ours and runs", "runs/0/events", made="moeconv"),
        "optimizer.pt": out("one and its training", "optimizer.pt", made="one"),
        "extra.safetensors": out("shards and another", "extra.safetensors", made="shards"),
        ".git/": out("a repository", ".git/HEAD", made="one"),
        "photo.jpg": out("a folder", "photo.jpg"),
        "config.json, tokenizer.json": out("no weights", "config.json", "tokenizer.json"),
        "model.safetensors": out("no config", "model.safetensors"),
        "additional_chat_templates/notes": out("more templates", "additional_chat_templates/notes", made="one"),
        "a/, b/": out("several", "a/config.json", "b/config.json"),
    }
    before = hashes(tmp_path)
    for lost, path in bad.items():
        for more in ([], ["--dry-run"]):
            done = cli("upcycle", source, path, "--no-check", "--overwrite", *more, "--json")
            assert done.code == 4 and f"would delete: {lost}" in done.json["error"]["message"], done
    many = out("many", *(f"{i}.txt" for i in range(9)))
    with pytest.raises(OutputError, match=r"0\.txt, .*4\.txt and 4 more"):
        check_target(many, reads=(), overwrite=True)
    shutil.rmtree(many)
    assert hashes(tmp_path) == before
    for path in good:
        assert cli("upcycle", source, path, "--no-check", "--overwrite").code == 0
        assert (path / "moeconv_manifest.json").is_file() and strangers(path) == []
    assert not [n for n in os.listdir(tmp_path) if n.startswith(".")]


def test_a_swap_of_where_one_stands(tmp_path, cli, monkeypatch):
    source = make_dense(tmp_path / "source")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("mine")
    monkeypatch.chdir(tmp_path / "home")
    done = cli("upcycle", source, ".", "--no-check", "--overwrite", "--json")
    assert done.code == 4 and "thesis.tex" in done.json["error"]["message"]
    assert (tmp_path / "home" / "thesis.tex").read_text() == "mine"


# -- single files ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_file_is_replaced_by_its_own_kind_only(tmp_path, cli):
    model, other = make_moe(tmp_path / "model"), make_moe(tmp_path / "other", shards=2)
    with writing_artifact(tmp_path / "overlay", [], metadata=artifact_metadata("overlay")):
        pass
    (tmp_path / "page.html").write_text("<!doctype html><p>mine</p>")
    (tmp_path / "data.json").write_text('{"command": "inspect", "curve": 3}')
    (tmp_path / "plot.svg").write_text("<?xml version='1.0'?><svg/>")
    (tmp_path / "text").write_text("mine")
    (tmp_path / "plot.png").write_bytes(b"\x89PNG mine")
    (tmp_path / "link.html").symlink_to(tmp_path / "nowhere")
    shards = sorted(other.glob("*.safetensors"))
    before = hashes(tmp_path)
    commands = [
        *(("calibrate", model, path, "--data", tmp_path / "text") for path in
          (tmp_path / "overlay", tmp_path / "text", tmp_path / "page.html", *shards, other / "config.json", other)),
        *(("report", model, path) for path in
          (tmp_path / "text", tmp_path / "page.html", *shards, other / "config.json", tmp_path / "link.html")),
        *(("prune", model, path, "--curve", "--data", tmp_path / "text") for path in
          (tmp_path / "data.json", tmp_path / "plot.svg", tmp_path / "plot.png", other / "config.json")),
    ]  # fmt: skip
    for words in commands:
        for more in ([], ["--overwrite"]):
            done = cli(*words, *more, "--json")
            assert done.code == 4, (words, done)
    assert hashes(tmp_path) == before
    shards[1].unlink()  # a name that the index has is the model's, be the file there or not
    done = cli("report", model, shards[1], "--json")
    assert done.code == 4 and "a file of the model" in done.json["error"]["message"]
    (tmp_path / "new.html").touch()  # as mktemp leaves it
    for _ in range(2):
        assert cli("report", model, tmp_path / "new.html", "--overwrite").code == 0


@pytest.mark.slow
def test_a_curve_knows_its_own(tmp_path):
    pytest.importorskip("matplotlib")
    from moeconv.prune.curve import _draw

    row = {"ratio": 0.5, "loss_increase": 1.0, "kl": 1.0}
    for name in ("a.png", "a.svg", "a.pdf"):
        _draw({"curve": [row, row], "criterion": "random"}, tmp_path / name)
        assert is_curve(tmp_path / name), name
    (tmp_path / "a.json").write_text('{"command": "prune", "curve": []}')
    assert is_curve(tmp_path / "a.json")


def test_the_library_refuses_as_the_command_does(tmp_path):
    from moeconv.calibrate.run import calibrate
    from moeconv.tune.run import tune

    model, teacher = make_moe(tmp_path / "model"), make_dense(tmp_path / "teacher")
    data = tmp_path / "text.txt"
    data.write_text("a b c")
    before = hashes(tmp_path)
    for out in (model / "stats", data, model / "model.safetensors"):
        with pytest.raises(OutputError):
            calibrate(model, out, data=[str(data)], overwrite=True)
    for out in (teacher / "model.safetensors", teacher / "new", data):
        with pytest.raises(OutputError):
            tune(model, out, teacher=str(teacher), data=(str(data),), overwrite=True)
    assert hashes(tmp_path) == before
