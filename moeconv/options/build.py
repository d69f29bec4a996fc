"""Makes option groups from the values of a command line, a recipe or a program, and turns them back into values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

from moeconv.errors import UsageError, did_you_mean, escape
from moeconv.options.declare import choices_of, flag_of, recognised
from moeconv.types import JsonObject

T = TypeVar("T")


def from_keywords(group: type[T], values: Mapping[str, object]) -> T:
    """The option group with those `values` that have the names of its fields, and aliases replaced by what they stand
    for.

    Raises UsageError for a value that is not among the choices of its option.
    """
    fields = {f.name: f for f in dataclasses.fields(group)}  # type: ignore[arg-type]
    made = group(**{k: recognised(fields[k], v) for k, v in values.items() if k in fields})
    for f in fields.values():
        value = getattr(made, f.name)
        if value is not None and (choices := choices_of(f)) and value not in choices:
            raise UsageError(
                f"{flag_of(f.name)} {escape(value)}: not one of {', '.join(choices)}", hint=did_you_mean(value, choices)
            )
    return made


def check_names(values: Mapping[str, object], *groups: type) -> None:
    """Raises UsageError for a name that is not a field of any of the groups."""
    known = [f.name for g in groups for f in dataclasses.fields(g)]
    for name in values:
        if name not in known:
            raise UsageError(f"unknown parameter {escape(name)!r}", hint=did_you_mean(name, known))


def parameters_of(*groups: object) -> JsonObject:
    """{name: value} of all fields of the option groups.

    The id of a plan depends on these values, and the functions of the library accept them as keywords. Raises TypeError
    for an object that is not an instance of a dataclass.
    """
    found: JsonObject = {}
    for group in groups:
        if not dataclasses.is_dataclass(group) or isinstance(group, type):
            raise TypeError(f"{type(group).__name__} is not a group of options")
        found |= {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}
    return found
