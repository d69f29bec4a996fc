"""How an option is declared, and how its flag, choices, help text and paths are read from the declaration."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import field
from importlib import import_module
from typing import Any, Literal

Reads = Literal["", "model", "file", "data"]


def option(
    default: object, help: str, *, choices: tuple[str, ...] | str = (), words: str = "", reads: Reads = ""
) -> Any:  # fmt: skip
    """A dataclass field with its help text.

    `choices` are the words that the option accepts, or "module:name" of a registry or function that has them. The
    module is imported only on use, so that the words are defined in one place and `--help` stays fast. In the same
    way, `words` names a function that returns the values of the placeholders in `help`.
    If the value of the option is a path, `reads` states what the command reads there, so that no output can replace it:
    the directory of a model, a file, or data (a file or directory, FILE=WEIGHT).
    """
    return field(default=default, metadata={"help": help, "choices": choices, "words": words, "reads": reads})


def choices_of(parameter: dataclasses.Field[object]) -> tuple[str, ...]:
    """The words that an option accepts; () if it accepts any value.

    Raises InputError if another package that adds choices cannot be loaded.
    """
    choices = parameter.metadata["choices"]
    return tuple(_found(choices) if isinstance(choices, str) else choices)


def help_of(parameter: dataclasses.Field[object]) -> str:
    """The help text of an option, with its placeholders filled in."""
    help: str = parameter.metadata["help"]
    words: str = parameter.metadata["words"]
    return help.format_map(_found(words)) if words else help


def _found(place: str) -> Any:
    """The object at "module:name"; for a function, its result."""
    module, _, name = place.partition(":")
    found = getattr(import_module(module), name)
    return found() if callable(found) else found


def flag_of(name: str) -> str:
    """The flag of an option: top_k -> --top-k."""
    return "--" + name.replace("_", "-")


def reads_of(
    values: Mapping[str, object], *groups: type, kinds: tuple[Reads, ...] = ("model", "file", "data")
) -> list[tuple[str, str]]:
    """(flag, path) of everything that the options of these groups read, according to their `values`.

    Names on the hub (hf://) are included, standard input is not. Data may be given as FILE=WEIGHT, but the name of a
    file may contain a `=` too: both interpretations are returned.
    """
    found: list[tuple[str, str]] = []
    for f in (f for group in groups for f in dataclasses.fields(group)):
        kind, value = f.metadata["reads"], values.get(f.name)
        if kind not in kinds or not value:
            continue
        listed = value if isinstance(value, Iterable) and not isinstance(value, str | os.PathLike) else (value,)
        for path in map(str, listed):
            found.append((flag_of(f.name), path))
            if kind == "data" and "=" in path:
                found.append((flag_of(f.name), path.rpartition("=")[0]))
    return [(flag, path) for flag, path in found if path not in ("", "-")]
