"""What no recipe may do: let an output touch what a step reads, or another output, or replace what is not ours."""

from __future__ import annotations

import os
from pathlib import Path

from moeconv.checkpoint.guard import guard
from moeconv.checkpoint.reader import MANIFEST_NAME
from moeconv.checkpoint.target import check_swap
from moeconv.options import reads_of
from moeconv.recipe.read import GROUPS, Recipe, Step
from moeconv.report.step import check_report_target

_SOURCE = "the source"


def read_by(step: Step) -> list[tuple[str, str]]:
    """(the word that names it, the path) of everything that a step reads, its source first."""
    return [(_SOURCE, step.source), *reads_of(step.parameters, *GROUPS[step.command])]


def guard_recipe(recipe: Recipe) -> None:
    """Refuse a recipe before any of its steps runs. Raises OutputError."""
    outputs = [step.to for step in recipe.steps if step.to is not None]
    given, written = [("the recipe", recipe.path)], set[str]()
    for step in recipe.steps:  # what an earlier one wrote is to be read, and nested in nothing
        given += [(word, path) for word, path in read_by(step) if not _made(word, path, written)]
        written |= {os.path.abspath(step.to)} if step.to is not None else set()
    measured = [] if recipe.evaluate is None else reads_of(recipe.evaluate, *GROUPS["evaluate"])
    given += [(word, path) for word, path in measured if not _made(word, path, written)]
    for at, out in enumerate(outputs):
        guard(out, [*given, *(("the output", other) for other in outputs[:at] + outputs[at + 1 :])])
    if recipe.report is not None:
        guard(recipe.report, [*given, *(("the output", out) for out in outputs)])
        if os.path.lexists(recipe.report):
            check_report_target(Path(recipe.report), overwrite=True)
    for step in recipe.steps:
        if step.to is not None and step.parameters.get("overwrite") and os.path.isdir(step.to):
            check_swap(Path(step.to))


def _made(word: str, path: str, written: set[str]) -> bool:
    """Whether what is read under this word is what an earlier step writes. A teacher or a reference that stands there
    already, and is not an output of moeconv, is meant as it is."""
    if os.path.abspath(path) not in written:
        return False
    return word == _SOURCE or not os.path.isdir(path) or os.path.isfile(os.path.join(path, MANIFEST_NAME))
