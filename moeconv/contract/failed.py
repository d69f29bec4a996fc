"""The JSON of an error, which any command prints."""

from __future__ import annotations

from typing_extensions import TypedDict


class ErrorFields(TypedDict):
    """The exit code, message and hint of an error."""

    code: int
    message: str
    hint: str | None


class Failed(TypedDict):
    """What any command prints with --json when it fails."""

    error: ErrorFields
