"""A recipe that YAML itself trips over, or whose steps cannot follow each other, is refused with its file and line."""

from __future__ import annotations

import os

import pytest

from moeconv.errors import UsageError
from moeconv.recipe.read import load_recipe

STEP = "steps:\n  - {step: upcycle, from: a, to: b, with: {experts: %s}}\n"


@pytest.mark.parametrize(
    "text, said",
    [
        ("steps: &a\n  - *a\n", "r.yaml"),
        (STEP % "2020-99-99", "r.yaml"),
        ("vars: {e: '[1'}\n" + STEP % "'${e}'", "r.yaml:3: "),
    ],
    ids=["alias in itself", "no such date", "a variable that is no YAML"],
)
def test_a_recipe_that_yaml_cannot_read_is_wrong_usage(tmp_path, text, said):
    (tmp_path / "r.yaml").write_text(text, "utf-8")
    with pytest.raises(UsageError, match=said):
        load_recipe(str(tmp_path / "r.yaml"))


@pytest.mark.parametrize(
    "steps, said",
    [
        ([("a", "b"), ("a", "b")], "r.yaml:3: two steps write b"),
        ([("a", "b"), ("a", "x/../b")], "r.yaml:3: two steps write b"),
        ([("b", "c"), ("a", "b")], "r.yaml:2: b is written by this step or a later one"),
        ([("b", "b")], "r.yaml:2: b is written by this step"),
        ([("''", "b")], "r.yaml:2: from is empty"),
    ],
)
def test_steps_that_cannot_follow_each_other(tmp_path, steps, said):
    lines = [f"  - {{step: upcycle, from: {a}, to: {b}}}" for a, b in steps]
    (tmp_path / "r.yaml").write_text("\n".join(["steps:", *lines]), "utf-8")
    with pytest.raises(UsageError, match=said):
        load_recipe(str(tmp_path / "r.yaml"))


@pytest.mark.parametrize("out", ("b", "./b", "x/../b", "b/"))
@pytest.mark.parametrize("spelt", ("b", "./b", "b/", "x/../b", "{folder}/b", "../{name}/b"))
def test_a_path_is_one_however_it_is_written(tmp_path, monkeypatch, out, spelt):
    spelt = spelt.format(folder=tmp_path, name=tmp_path.name)
    (tmp_path / "r.yaml").write_text(
        f"steps:\n  - {{step: upcycle, from: a, to: {out}}}\n"
        f"  - {{step: prune, from: {spelt}, to: c, with: {{stats: {spelt}/s.safetensors}}}}\n",
        "utf-8",
    )
    monkeypatch.chdir(tmp_path)
    for file in ("r.yaml", str(tmp_path / "r.yaml")):
        first, second = load_recipe(file).steps
        assert second.source == first.to and second.parameters["stats"] == os.path.join(first.to, "s.safetensors")


def test_a_link_before_the_parent_is_followed(tmp_path, monkeypatch):
    (tmp_path / "far" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "deep")
    text = "steps:\n  - {step: upcycle, from: a, to: b}\n  - {step: prune, from: %s, to: c}\n"
    monkeypatch.chdir(tmp_path)
    for spelt, same in (("link/../b", False), ("link/../../b", True)):
        (tmp_path / "r.yaml").write_text(text % spelt, "utf-8")
        first, second = load_recipe("r.yaml").steps
        assert (second.source == first.to) == same
