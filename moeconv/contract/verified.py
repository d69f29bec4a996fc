"""The JSON of `moeconv verify`."""

from __future__ import annotations

from typing_extensions import TypedDict


class Checked(TypedDict):
    """How much was looked at."""

    shards: int
    tensors: int
    bytes: int


class Loads(TypedDict):
    """Whether the model loads strictly and runs; null where --load was not given."""

    transformers: bool | None


class Verified(TypedDict):
    """`moeconv verify`."""

    ok: bool
    problems: list[str]
    checked: Checked
    manifest: bool
    loads: Loads
    warnings: list[str]
