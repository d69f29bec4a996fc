"""Values of config.json that are lists with one entry per layer."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from moeconv.errors import InputError
from moeconv.units import counted


def one_per_layer(
    value: object, layers: int, key: str, *, noun: str = "word", allowed: Collection[str] | None = None
) -> list[Any]:
    """`value`, the value of config key `key`.

    Raises InputError unless it is a list with an entry for each of the `layers`, and each entry is `allowed`.
    """
    listed = isinstance(value, list) and len(value) == layers
    if isinstance(value, list) and listed and (allowed is None or all(str(entry) in allowed for entry in value)):
        return value
    *others, last = allowed or ("",)
    which = f", each {', '.join(others)} or {last}" if allowed else ""
    raise InputError(
        f"config.json: {key} must be a list of {counted(layers, noun)}{which}",
        hint="Correct config.json, or download it again.",
    )
