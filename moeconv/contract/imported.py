"""The JSON of `moeconv import`."""

from __future__ import annotations

from typing_extensions import TypedDict

from moeconv.contract.shared import Written


class ImportBlock(TypedDict):
    """llama.cpp's name of the architecture, how many tensors of the file have each ggml type, and the dtype."""

    architecture: str
    types: dict[str, int]
    dtype: str


_Imported = TypedDict("_Imported", {"import": ImportBlock})  # a class cannot have a field of this name


class ImportResult(Written, _Imported):
    """What `moeconv import` prints."""
