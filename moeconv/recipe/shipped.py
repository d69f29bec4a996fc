"""`moeconv recipes`: the recipes, shell scripts and CI files that ship with moeconv, and copies of them."""

from __future__ import annotations

import os
import re
import shutil
from itertools import takewhile
from pathlib import Path

import moeconv
from moeconv.checkpoint.writer import output_errors
from moeconv.contract import CopiedRecipe, ShippedRecipe, ShippedRecipes
from moeconv.errors import OutputError, UsageError, did_you_mean, escape

SHIPPED = Path(moeconv.__file__).parent / "recipes"


def shipped() -> dict[str, Path]:
    """The file or directory of each recipe by its name: the file name, without .yaml but with any other suffix."""
    return {path.name.removesuffix(".yaml"): path for path in sorted(SHIPPED.iterdir()) if path.name[0] not in "._"}


def recipes(name: str | None = None, dest: str | None = None) -> ShippedRecipes | CopiedRecipe:
    """List the recipes that ship; with a `name`, copy that one to `dest` (None: into the working directory).

    Raises UsageError for an unknown name, and OutputError if there is something at `dest` already.
    """
    found = shipped()
    if name is None:
        return {"recipes": [_described(name, path) for name, path in found.items()]}
    known = name.removesuffix(".yaml")
    if known not in found:
        raise UsageError(
            f"no recipe named {escape(name)} ships with moeconv",
            hint=did_you_mean(known, found) or "`moeconv recipes` lists the names.",
        )
    source = found[known]
    target = _target(source, dest)
    with output_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy(source, target)
    made = sorted(target.rglob("*")) if target.is_dir() else [target]
    return {"command": "recipes", "output": str(target), "copied": [str(path) for path in made]}


def _target(source: Path, dest: str | None) -> Path:
    """Where a copy goes. An existing directory, or a path that ends with /, gets the copy inside."""
    target = Path(dest or source.name)
    if dest is not None and (dest.endswith(os.sep) or target.is_dir()):
        target /= source.name
    if os.path.lexists(target):
        raise OutputError(f"{escape(target)} exists already", hint="Give another path: `moeconv recipes NAME DEST`.")
    return target


def _described(name: str, path: Path) -> ShippedRecipe:
    """The row of a recipe, with the first sentence of its comment as description."""
    if path.is_dir():
        return {"name": name, "files": [file.name for file in sorted(path.iterdir())],
                "about": "A shell script, a workflow and tested versions for CI."}  # fmt: skip
    comment = takewhile(lambda line: line.startswith("#"), path.read_text("utf-8").splitlines())
    words = " ".join(line.lstrip("# ") for line in comment if not line.startswith("#!"))
    return {"name": name, "files": [path.name], "about": re.split(r"[.:;] ", words)[0] + "."}
