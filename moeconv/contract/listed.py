"""The JSON of `moeconv families`, `formats` and `schema`."""

from __future__ import annotations

from typing_extensions import TypedDict

FamilyPair = TypedDict("FamilyPair", {"from": str, "to": str, "exact": bool, "default": bool, "note": str})


class FamilySource(TypedDict):
    """What can be done with checkpoints of a model_type.

    `text` is the model_type of the language model in a multimodal model, `alias_of` that of the family whose class it
    shares; null for others. `targets` are what `upcycle` makes of it, the default first. `runtimes` states for each
    engine how it runs the result of the verbs, which for a dense model is one of the first target: same, differs or
    refused (measured, in comparison with transformers), listed (in the engine's list of models), no, or unknown.
    """

    model_type: str
    kind: str
    text: str | None
    alias_of: str | None
    verbs: list[str]
    targets: list[str]
    formats: list[str]
    runtimes: dict[str, str]


class Families(TypedDict):
    """What `moeconv families` prints. With --model, each key has only what concerns that model."""

    dense: list[str]
    moe: list[str]
    multimodal: dict[str, list[str]]
    pairs: list[FamilyPair]
    sources: list[FamilySource]


class FormatRow(TypedDict):
    """A scheme of a format.

    `bits` is null for a scheme of mixed widths. `measured` has the version of each runtime that was run with the
    scheme; null means that `loads` was taken from the runtime's source code or documentation. `stored_bits` are the
    bits per weight with scales, and `error` is the relative RMS error on Gaussian weights; null where it is not known.
    `hardware` lists the machines on which a runtime has kernels for it, and `command` writes it.
    """

    name: str
    format: str
    scheme: str
    bits: int | None
    loads: dict[str, str]
    measured: dict[str, str | None]
    notes: dict[str, str]
    stored_bits: float | None
    error: float | None
    hardware: list[str]
    command: str


class Formats(TypedDict):
    """What `moeconv formats` prints. `place` is that of --for, null without it."""

    place: str | None

    formats: list[FormatRow]


class Schemas(TypedDict):
    """What `moeconv schema` prints: one JSON Schema per command."""

    schemas: dict[str, dict[str, object]]
