"""The JSON of `moeconv verify`."""

from __future__ import annotations

from typing_extensions import TypedDict


class Checked(TypedDict):
    """How many shards, tensors and bytes were checked."""

    shards: int
    tensors: int
    bytes: int


class Loads(TypedDict):
    """Whether the model loads strictly and runs; null without --load."""

    transformers: bool | None


class Verified(TypedDict):
    """What `moeconv verify` prints."""

    path: str
    ok: bool
    problems: list[str]
    checked: Checked
    manifest: bool
    loads: Loads
    warnings: list[str]
