"""The JSON of `moeconv families`, `formats` and `schema`."""

from __future__ import annotations

from typing_extensions import TypedDict

FamilyPair = TypedDict("FamilyPair", {"from": str, "to": str, "exact": bool, "default": bool, "note": str})


class Families(TypedDict):
    """`moeconv families`."""

    dense: list[str]
    moe: list[str]
    multimodal: dict[str, list[str]]
    pairs: list[FamilyPair]


class FormatRow(TypedDict):
    """A scheme of a format; `bits` is null for mixed ones. `measured` has the version of each runtime that was run with
    it, null where `loads` is from the runtime's source or documents."""

    name: str
    format: str
    scheme: str
    bits: int | None
    loads: dict[str, str]
    measured: dict[str, str | None]
    notes: dict[str, str]


class Formats(TypedDict):
    """`moeconv formats`."""

    formats: list[FormatRow]


class Schemas(TypedDict):
    """`moeconv schema`: a JSON Schema per command."""

    schemas: dict[str, dict[str, object]]
