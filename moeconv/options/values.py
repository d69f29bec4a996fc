"""Parsers of values that are given as text: sizes, numbers, and ranges of layers."""

from __future__ import annotations

import re

from moeconv.errors import UsageError, escape

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*$", re.IGNORECASE)


_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_size(text: str | int, *, flag: str) -> int:
    """A size such as `5GB`, `500MB`, `2GiB` or `1000` in bytes. Raises UsageError, which names the flag."""
    match = _SIZE.match(str(text))
    if not match:
        raise UsageError(f"{flag} {escape(text)}: not a size", hint="Examples: 5GB, 500MB, 2GiB.")
    number, unit, binary = match.groups()
    size = float(number) * (1024 if binary else 1000) ** _POWERS[unit.upper()]
    if size >= 2**63:
        raise UsageError(f"{flag} {escape(text)}: too large", hint="Examples: 5GB, 500MB, 2GiB.")
    return int(size)


def device_limit(text: str | int | None) -> int | None:
    """The value of --max-device-memory in bytes; None where there is no limit. Raises UsageError."""
    return None if text is None else parse_size(text, flag="--max-device-memory")


def parse_index(text: str) -> int | None:
    """The number in a text of at most nine ASCII digits; None for any other text."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else None


def parse_layers(text: str, *, layers: int, flag: str = "--layers") -> tuple[int, ...]:
    """The layers of `all`, or of a list such as `0,2,8-15`, in ascending order.

    Raises UsageError for a list that cannot be read or an index outside the model.
    """
    if text.strip() == "all":
        return tuple(range(layers))
    chosen: set[int] = set()
    for word in text.split(","):
        first, dash, last = word.strip().partition("-")
        try:
            a = int(first)
            b = int(last) if last else (layers - 1 if dash else a)
        except ValueError:
            raise UsageError(
                f"{flag} {escape(text)}: {escape(word)!r} is neither a number nor a range", hint="Example: 0,2,8-15."
            ) from None
        if not 0 <= a <= b < layers:
            raise UsageError(f"{flag} {escape(text)}: {escape(word)} is outside layers 0 to {layers - 1}")
        chosen.update(range(a, b + 1))
    return tuple(sorted(chosen))
