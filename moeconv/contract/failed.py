"""The JSON of an error, which is the same for every command."""

from __future__ import annotations

from typing_extensions import TypedDict


class ErrorFields(TypedDict):
    """The exit code, message and hint of an error."""

    code: int
    message: str
    hint: str | None


class Failed(TypedDict):
    """What every command prints with --json if it fails."""

    error: ErrorFields
