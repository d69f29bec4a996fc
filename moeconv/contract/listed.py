"""The JSON of `moeconv families`, `formats` and `schema`."""

from __future__ import annotations

from typing_extensions import TypedDict

FamilyPair = TypedDict("FamilyPair", {"from": str, "to": str, "exact": bool, "default": bool, "note": str})


class Families(TypedDict):
    """What `moeconv families` prints."""

    dense: list[str]
    moe: list[str]
    multimodal: dict[str, list[str]]
    pairs: list[FamilyPair]


class FormatRow(TypedDict):
    """A scheme of a format.

    `bits` is null for a scheme of mixed widths. `measured` has the version of each runtime that was run with the
    scheme; null means that `loads` was taken from the runtime's source code or documentation.
    """

    name: str
    format: str
    scheme: str
    bits: int | None
    loads: dict[str, str]
    measured: dict[str, str | None]
    notes: dict[str, str]


class Formats(TypedDict):
    """What `moeconv formats` prints."""

    formats: list[FormatRow]


class Schemas(TypedDict):
    """What `moeconv schema` prints: one JSON Schema per command."""

    schemas: dict[str, dict[str, object]]
