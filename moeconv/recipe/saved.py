"""The recipe that was run, saved beside its outputs: with its variables filled in and absolute paths."""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from moeconv.checkpoint.target import starts_with
from moeconv.checkpoint.writer import replace_file
from moeconv.recipe.read import GROUPS, Recipe, Step
from moeconv.types import Config, JsonObject

NAME = "recipe.yaml"
_MARK = b"# saved by moeconv run\n"


def save_recipe(recipe: Recipe) -> str | None:
    """Write the recipe into the directory of its last output, where `moeconv run` repeats it, and return the path. None
    where another file has that name, or where no step writes anything."""
    written = [step.to for step in recipe.steps if step.to is not None]
    if not written:
        return None
    path = Path(os.path.abspath(written[-1])).parent / NAME
    if os.path.lexists(path) and not starts_with(path, (_MARK,)):
        return None
    replace_file(path, _MARK + yaml.safe_dump(_written(recipe), sort_keys=False, allow_unicode=True).encode())
    return str(path)


def _written(recipe: Recipe) -> JsonObject:
    value: JsonObject = {"name": recipe.name}
    if recipe.evaluate is not None:
        value["evaluate"] = _parameters("evaluate", recipe.evaluate)
    if recipe.report is not None:
        value["report"] = _absolute(recipe.report)
    return value | {"steps": [_step(step) for step in recipe.steps]}


def _step(step: Step) -> JsonObject:
    value: JsonObject = {"step": step.command, "name": step.name, "from": _absolute(step.source)}
    if step.to is not None:
        value["to"] = _absolute(step.to)
    return value | {"with": _parameters(step.command, step.parameters)}


def _parameters(command: str, parameters: Config) -> JsonObject:
    """The parameters as YAML has them: lists for tuples, and absolute paths."""
    fields = {f.name: f for group in GROUPS[command] for f in group.__dataclass_fields__.values()}  # type: ignore[attr-defined]
    made: JsonObject = {}
    for name, value in parameters.items():
        reads = fields[name].metadata["reads"]
        if isinstance(value, tuple | list):
            made[name] = [_absolute(item) if reads else item for item in value]
        else:
            made[name] = _absolute(value) if reads and isinstance(value, str) else value
    return made


def _absolute(path: str) -> str:
    """A path that is the same in every working directory; names on the hub stay as they are."""
    return path if path.startswith("hf://") or path == "-" else os.path.abspath(path)
