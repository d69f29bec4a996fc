"""Recipes as they are run: numbers, places of errors, where outputs land, kept steps, verification, and repeating."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tiny import make_dense
from unit.test_gguf import tokenizer, write

from moeconv.recipe.read import load_recipe

RECIPE = """name: two
steps:
  - step: upcycle
    from: dense
    to: made/moe
    with: {experts: 4, no_check: true}
  - step: quantize
    from: made/moe
    to: made/packed
    with: {format: bitsandbytes, scheme: int8, group_size: GROUP}
  - step: verify
    from: made/packed
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    (tmp_path / "user").mkdir()
    monkeypatch.chdir(tmp_path / "user")
    make_dense(tmp_path / "recipes" / "dense", hidden=64, intermediate=128)
    path = tmp_path / "recipes" / "two.yaml"
    path.write_text(RECIPE.replace(", group_size: GROUP", ""))
    return path


def test_a_number_is_a_word_where_an_option_takes_both(recipe):
    recipe.write_text(RECIPE.replace("GROUP", "64"))
    assert load_recipe(str(recipe)).steps[1].parameters["group_size"] == "64"
    recipe.write_text(RECIPE.replace("experts: 4", "experts: four").replace("GROUP", "64"))
    with pytest.raises(Exception, match=r"two\.yaml:6: experts"):
        load_recipe(str(recipe))


def test_outputs_land_where_out_says_and_inputs_stay_with_the_recipe(recipe, tmp_path, cli):
    done = cli("run", recipe, "--out", tmp_path / "here", "--json")
    assert done.code == 0, done.err + done.out
    assert Path(done.json["output"]) == tmp_path / "here" / "made" / "packed"
    assert not (recipe.parent / "made").exists()
    assert done.json["steps"][-1]["passed"] is True
    saved = Path(done.json["saved"])
    assert saved == tmp_path / "here" / "made" / "recipe.yaml"
    again = cli("run", saved)
    assert again.code == 0 and again.out.count("kept") == 2 and "kept: its inputs, parameters" in again.err
    assert yaml.safe_load(saved.read_text())["steps"][0]["from"] == str(recipe.parent / "dense")


def test_outputs_land_where_the_user_stands(recipe, tmp_path, cli, monkeypatch):
    """The saved recipe repeats the run from any directory."""
    before = sorted(recipe.parent.rglob("*"))
    assert cli("run", recipe, "--dry-run").code == 0 and not any((tmp_path / "user").iterdir())
    done = cli("run", recipe, "--json")
    assert done.code == 0, done.err + done.out
    assert (tmp_path / "user" / done.json["output"]).samefile(tmp_path / "user" / "made" / "packed")
    assert sorted(recipe.parent.rglob("*")) == before
    saved = (tmp_path / "user" / done.json["saved"]).resolve()
    monkeypatch.chdir(tmp_path)
    again = cli("run", saved, "--json")
    assert again.code == 0 and [row["kept"] for row in again.json["steps"][1:3]] == [True, True]
    assert Path(again.json["output"]) == tmp_path / "user" / "made" / "packed"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipes", "user"]


def test_only_what_the_steps_write_is_in_the_directory_of_the_outputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r").mkdir()
    text = "steps:\n  - {step: quantize, from: moe, to: out, with: {data: [out.txt, out/a.txt, moe/a.txt]}}\n"
    (tmp_path / "r" / "r.yaml").write_text(text)
    step = load_recipe("r/r.yaml").steps[0]
    assert (step.source, step.to) == ("r/moe", "out")
    assert step.parameters["data"] == ("r/out.txt", "out/a.txt", "r/moe/a.txt")


def test_a_file_of_the_user_with_the_name_of_the_saved_recipe_stays(recipe, tmp_path, cli):
    (tmp_path / "user" / "made").mkdir()
    (tmp_path / "user" / "made" / "recipe.yaml").write_text("mine")
    done = cli("run", recipe, "--json")
    assert done.code == 0 and "saved" not in done.json
    assert (tmp_path / "user" / "made" / "recipe.yaml").read_text() == "mine"


def test_an_error_of_a_step_names_its_line(recipe, cli):
    recipe.write_text(RECIPE.replace("experts: 4", "experts: 4, top_k: 9").replace(", group_size: GROUP", ""))
    for words in ([], ["--dry-run"]):
        done = cli("run", recipe, *words, "--json")
        assert done.code == 2 and done.json["error"]["message"].startswith("two.yaml:3: upcycle"), done.out
    recipe.write_text("steps: []\nsteps: []\n")
    assert "two.yaml:2: key 'steps' appears twice" in cli("run", recipe).err


def test_verification_that_fails_ends_the_run(recipe, cli):
    assert cli("run", recipe, "--out", recipe.parent).code == 0
    with open(recipe.parent / "made" / "packed" / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    recipe.write_text("steps:\n  - step: verify\n    from: made/packed\n")
    done = cli("run", recipe, "--json")
    assert done.code == 5 and "two.yaml:2: verify: model.safetensors has changed" in done.json["error"]["message"]


def test_a_recipe_that_ships_but_is_not_here_is_offered(tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "`moeconv recipes grid` copies" in cli("run", "grid.yaml").err


@pytest.mark.parametrize("steps", [1, 2])
def test_the_report_of_a_recipe_that_ends_with_a_gguf_file_is_about_the_last_checkpoint(tmp_path, cli, steps):
    tokenizer(make_dense(tmp_path / "dense", hidden=64, intermediate=128))
    upcycle = {"step": "upcycle", "from": "dense", "to": "made/moe", "with": {"experts": 4, "no_check": True}}
    asked = {"format": "gguf", "scheme": "q8_0"}
    quantize = {"step": "quantize", "from": "made/moe" if steps == 2 else "dense", "to": "made/gguf", "with": asked}
    recipe = tmp_path / "gguf.yaml"
    recipe.write_text(yaml.safe_dump({"report": "made/page.html", "steps": [upcycle, quantize][-steps:]}))
    done = cli("run", recipe, "--out", tmp_path, "--json")
    assert done.code == 0, done.out + done.err
    assert done.json["report"] == str(tmp_path / "made" / "page.html")
    page = (tmp_path / "made" / "page.html").read_text()
    assert ("4 experts" in page or "mixtral" in page.lower()) == (steps == 2)


def test_a_recipe_starts_with_a_gguf_file_that_it_imports(tmp_path, cli, monkeypatch):
    """A second run keeps the steps of an unchanged file; the dry run states the sizes of the run."""
    monkeypatch.chdir(tmp_path)
    dense = tokenizer(make_dense(tmp_path / "dense", hidden=64, intermediate=128))
    write(dense, tmp_path / "gguf", scheme="q8_0")
    steps = [
        {"step": "import", "from": "gguf/model.gguf", "to": "made/dense"},
        {"step": "upcycle", "from": "made/dense", "to": "made/moe", "with": {"experts": 4, "no_check": True}},
        {"step": "quantize", "from": "made/moe", "to": "made/back", "with": {"format": "gguf", "scheme": "q8_0"}},
    ]
    recipe = tmp_path / "import.yaml"
    recipe.write_text(yaml.safe_dump({"name": "import", "steps": steps}))
    planned, done, again = (cli("run", recipe, "--json", *words) for words in (["--dry-run"], [], []))
    assert (planned.code, done.code, again.code) == (0, 0, 0), planned.out + done.out + again.out
    assert [row["bytes"] for row in planned.json["steps"]] == [row["bytes"] for row in done.json["steps"]]
    assert done.json["steps"][0]["bytes"] == (tmp_path / "gguf" / "model.gguf").stat().st_size
    assert [row["kept"] for row in again.json["steps"][1:]] == [True, True, True]
    write(dense, tmp_path / "other", scheme="q4_0")
    (tmp_path / "other" / "model.gguf").replace(tmp_path / "gguf" / "model.gguf")
    third = cli("run", recipe, "--json")
    assert third.code == 4 and "import.yaml:3: import: OUT" in third.json["error"]["message"], third.out
    (tmp_path / "gguf" / "model.gguf").write_bytes(b"nothing of the kind")
    for words in ([], ["--dry-run"]):
        assert "is not a GGUF file" in cli("run", recipe, *words).err
