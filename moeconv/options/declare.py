"""How an option is declared, and what its declaration tells: flag, choices, help text, and what it reads."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import field
from importlib import import_module
from typing import Any, Literal

Reads = Literal["", "model", "file", "data"]


def option(
    default: Any, help: str, *, choices: tuple[str, ...] | str = (), words: str = "", reads: Reads = ""
) -> Any:  # fmt: skip
    """A dataclass field with its help text.

    `choices` are the words that it takes, or "module:name" of a registry or a function that gives them: imported when
    they are asked for, so that the words of a registry stand in one place and `--help` stays quick. In the same way
    `words` is the place of a function that gives what stands in braces in `help`.
    `reads` says what the command reads at the path that is the value, so that no output can replace it: a model's
    directory, a file, or data (a file or a directory, FILE=WEIGHT).
    """
    return field(default=default, metadata={"help": help, "choices": choices, "words": words, "reads": reads})


def choices_of(parameter: dataclasses.Field[Any]) -> tuple[str, ...]:
    """The words that a parameter takes, () where any will do. Raises InputError where a package that adds one is
    broken."""
    choices = parameter.metadata["choices"]
    return tuple(_found(choices) if isinstance(choices, str) else choices)


def help_of(parameter: dataclasses.Field[Any]) -> str:
    """The help text of a parameter, with the words of the registries in it."""
    help: str = parameter.metadata["help"]
    words: str = parameter.metadata["words"]
    return help.format_map(_found(words)) if words else help


def _found(place: str) -> Any:
    """What lies at "module:name"; of a function, what it gives."""
    module, _, name = place.partition(":")
    found = getattr(import_module(module), name)
    return found() if callable(found) else found


def flag_of(name: str) -> str:
    """The flag of a parameter: top_k -> --top-k."""
    return "--" + name.replace("_", "-")


def reads_of(
    values: Mapping[str, Any], *groups: type, kinds: tuple[Reads, ...] = ("model", "file", "data")
) -> list[tuple[str, str]]:
    """(flag, path) of everything that the options of these groups name in `values`, hub names (hf://) among them; not
    standard input.

    Data may be FILE=WEIGHT, and a file may have a `=` in its name: both are given.
    """
    found: list[tuple[str, str]] = []
    for f in (f for group in groups for f in dataclasses.fields(group)):
        kind, value = f.metadata["reads"], values.get(f.name)
        if kind not in kinds or not value:
            continue
        for path in map(str, (value,) if isinstance(value, str | os.PathLike) else value):
            found.append((flag_of(f.name), path))
            if kind == "data" and "=" in path:
                found.append((flag_of(f.name), path.rpartition("=")[0]))
    return [(flag, path) for flag, path in found if path not in ("", "-")]
