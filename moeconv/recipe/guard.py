"""Checks before a recipe runs: no output may touch what a step reads or another output, or replace foreign files."""

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
    """(name, path) of everything that a step reads, its source first. The name is used in error messages."""
    return [(_SOURCE, step.source), *reads_of(step.parameters, *GROUPS[step.command])]


def guard_recipe(recipe: Recipe) -> None:
    """Refuse a recipe before any of its steps runs. Raises OutputError."""
    outputs = [step.to for step in recipe.steps if step.to is not None]
    given = _inputs(recipe)
    for at, out in enumerate(outputs):
        guard(out, [*given, *(("the output", other) for other in outputs[:at] + outputs[at + 1 :])])
    if recipe.report is not None:
        guard(recipe.report, [*given, *(("the output", out) for out in outputs)])
        if os.path.lexists(recipe.report):
            check_report_target(Path(recipe.report), overwrite=True)
    for step in recipe.steps:
        if step.to is not None and step.parameters.get("overwrite") and os.path.isdir(step.to):
            check_swap(Path(step.to))


def _inputs(recipe: Recipe) -> list[tuple[str, str]]:
    """(name, path) of everything that the recipe reads and that none of its earlier steps writes."""
    inputs, written = [("the recipe", recipe.path)], set[str]()
    for step in recipe.steps:
        inputs += [(name, path) for name, path in read_by(step) if not _is_output(name, path, written)]
        if step.to is not None:
            written.add(os.path.abspath(step.to))
    measured = [] if recipe.evaluate is None else reads_of(recipe.evaluate, *GROUPS["evaluate"])
    return inputs + [(name, path) for name, path in measured if not _is_output(name, path, written)]


def _is_output(name: str, path: str, written: set[str]) -> bool:
    """Whether the path that is read under this name is one that an earlier step writes. A teacher or a reference that
    exists already, and that moeconv did not write, is an input even if a step names its path as output."""
    if os.path.abspath(path) not in written:
        return False
    return name == _SOURCE or not os.path.isdir(path) or os.path.isfile(os.path.join(path, MANIFEST_NAME))
