"""How an option is declared, and how its flag, choices, help text and paths are read from the declaration."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import field
from importlib import import_module
from typing import Any, Literal, get_args

Reads = Literal["", "model", "file", "data"]
Panel = Literal["What it does", "Data", "Output", "Running"]
PANELS: tuple[Panel, ...] = get_args(Panel)  # in the order of the help texts

_LONGEST_LIST = 32  # characters of the choices that are shown in the place of the value
_PATHS = {"model": "MODEL", "file": "FILE", "data": "FILE"}
_TYPES = {int: "N", float: "X", bool: ""}


def option(
    default: object, help: str, *, choices: tuple[str, ...] | str = (), words: str = "", reads: Reads = "",
    aliases: str = "", metavar: str = "", panel: Panel | None = None,
) -> Any:  # fmt: skip
    """A dataclass field with its help text.

    `choices` are the words that the option accepts, or "module:name" of a registry or function that has them. The
    module is imported only on use, so that the words are defined in one place and `--help` stays fast. In the same
    way, `words` names a function that returns the values of the placeholders in `help`.
    `aliases` names a function that returns {other word: the word that it stands for}.
    If the value of the option is a path, `reads` states what the command reads there, so that no output can replace it:
    the directory of a model, a file, or data (a file or directory, FILE=WEIGHT).
    `metavar` is what help texts show in the place of the value; by default it follows from the choices, from `reads`
    and from the type. `panel` is the part of the help text, by default the `PANEL` of the group.
    """
    return field(
        default=default,
        metadata={
            "help": help, "choices": choices, "words": words, "reads": reads, "aliases": aliases, "metavar": metavar,
            "panel": panel,
        },
    )  # fmt: skip


def choices_of(parameter: dataclasses.Field[object]) -> tuple[str, ...]:
    """The words that an option accepts; () if it accepts any value.

    Raises InputError if another package that adds choices cannot be loaded.
    """
    choices = parameter.metadata["choices"]
    return tuple(_found(choices) if isinstance(choices, str) else choices)


def recognised(parameter: dataclasses.Field[object], value: object) -> object:
    """The word that `value` stands for: the same without regard to case and to `-` or `_`, or an alias of the option;
    `value` itself where it is neither."""
    choices, aliases = choices_of(parameter), parameter.metadata["aliases"]
    if not isinstance(value, str) or value in choices or not (choices or aliases):
        return value
    others: Mapping[str, str] = _found(aliases) if aliases else {}
    words = {_folded(word): word for word in (*others, *choices)}
    word = words.get(_folded(value), value)
    return others.get(word, word)


def _folded(word: str) -> str:
    return word.strip().lower().replace("-", "_")


def help_of(parameter: dataclasses.Field[object]) -> str:
    """The help text of an option, with its placeholders filled in."""
    help: str = parameter.metadata["help"]
    words: str = parameter.metadata["words"]
    return help.format_map(_found(words)) if words else help


def panel_of(group: type, parameter: dataclasses.Field[object]) -> Panel:
    """The part of the help text that shows an option of `group`."""
    own: Panel | None = parameter.metadata["panel"]
    of_group: Panel = getattr(group, "PANEL", "What it does")
    return own or of_group


def metavar_of(parameter: dataclasses.Field[object], kind: object, choices: Iterable[str] = ()) -> str:
    """What the help text shows in the place of the value of an option of type `kind`; "" for a switch."""
    listed = "|".join(choices)
    if listed and len(listed) <= _LONGEST_LIST:
        return f"[{listed}]"
    own: str = parameter.metadata["metavar"]
    plain = next((name for type_, name in _TYPES.items() if type_ in (kind, *get_args(kind))), "TEXT")
    return own or ("NAME" if listed else _PATHS.get(parameter.metadata["reads"], plain))


def _found(place: str) -> Any:
    """The object at "module:name"; for a function, its result."""
    module, _, name = place.partition(":")
    found = getattr(import_module(module), name)
    return found() if callable(found) else found


def flag_of(name: str) -> str:
    """The flag of an option: top_k -> --top-k; for_, since `for` is a Python keyword -> --for."""
    return "--" + name.rstrip("_").replace("_", "-")


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
