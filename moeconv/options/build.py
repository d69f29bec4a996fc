"""Option groups from the values of a command line, of a recipe or of a program, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from moeconv.errors import UsageError, did_you_mean, escape
from moeconv.options.declare import choices_of, flag_of

T = TypeVar("T")


def from_keywords(group: type[T], values: Mapping[str, Any]) -> T:
    """The group's dataclass from the values that it names. Raises UsageError for a value outside its choices."""
    names = {f.name for f in dataclasses.fields(group)}  # type: ignore[arg-type]
    made = group(**{k: v for k, v in values.items() if k in names})
    for f in dataclasses.fields(group):  # type: ignore[arg-type]
        value = getattr(made, f.name)
        if value is not None and (choices := choices_of(f)) and value not in choices:
            raise UsageError(
                f"{flag_of(f.name)} {escape(value)}: not one of {', '.join(choices)}", hint=did_you_mean(value, choices)
            )
    return made


def check_names(values: Mapping[str, Any], *groups: type) -> None:
    """Raises UsageError for a parameter that no group knows."""
    known = [f.name for g in groups for f in dataclasses.fields(g)]
    for name in values:
        if name not in known:
            raise UsageError(f"unknown parameter {escape(name)!r}", hint=did_you_mean(name, known))


def parameters_of(*groups: Any) -> dict[str, Any]:
    """The values of option groups by name: what a plan's id depends on, and keywords of the library's functions."""
    return {f.name: getattr(g, f.name) for g in groups for f in dataclasses.fields(g)}
