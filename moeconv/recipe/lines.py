"""Reads a YAML file, and the line of each of its keys and items."""

from __future__ import annotations

from pathlib import Path

import yaml

from moeconv.errors import UsageError, escape

KeyPath = tuple[str | int, ...]  # keys and indices from the top of the file down to a value


def read_yaml(file: Path) -> tuple[object, dict[KeyPath, int]]:
    """(the value of the file, {key path: line}). Raises UsageError that names the file and, where known, the line."""
    try:
        text = file.read_text("utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {escape(file)}: {error.strerror}", hint=_shipped(file)) from None
    except UnicodeDecodeError:
        raise UsageError(f"{escape(file)} is not UTF-8 text", hint="Give a YAML file.") from None
    lines: dict[KeyPath, int] = {}
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        value = yaml.safe_load(text)
        _note_lines(node, (), lines, name=file.name)  # RecursionError: an alias inside its own anchor
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a date that does not exist
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise UsageError(f"{escape(file.name)}{where}: {escape(problem)}", hint="Correct the YAML.") from None
    return value, lines


def _shipped(file: Path) -> str:
    """What to do about a recipe file that does not exist, which may be one that ships with moeconv."""
    from moeconv.recipe.shipped import shipped

    name = file.name.removesuffix(".yaml")
    return f"`moeconv recipes {name}` copies the recipe of that name." if name in shipped() else "Give a YAML file."


def _note_lines(node: yaml.Node | None, path: KeyPath, lines: dict[KeyPath, int], *, name: str) -> None:
    """Record the line of each key and item."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            at, line = (*path, key.value), key.start_mark.line + 1
            if at in lines:
                raise UsageError(f"{escape(name)}:{line}: key {escape(key.value)!r} appears twice")
            lines[at] = line
            _note_lines(value, at, lines, name=name)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            at = (*path, i)
            lines[at] = value.start_mark.line + 1
            _note_lines(value, at, lines, name=name)
