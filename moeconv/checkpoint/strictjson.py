"""JSON as moeconv accepts it from files it did not write: bounded, no duplicate keys, no half characters, and NaN and
Infinity only where Python's own JSON is what others write (config.json).

What parsing may cost is bounded by what the JSON speaks of: a few bytes are refused when they are more than a
checkpoint of their size can need, and the header or index of a large model is read however many tensors it names.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any

from moeconv.errors import InputError, LimitError, escape
from moeconv.types import JsonObject

# with nothing behind it: 40 MiB in each of the forms that parsing holds at once (bytes, text, values) stay within
# 200 MB, and so do the objects of 500,000 values
MAX_JSON_BYTES = 40 << 20
MAX_VALUES = 500_000


@dataclass(frozen=True)
class Limits:
    """What a JSON text may cost: its bytes (as characters in memory), and its values (commas and brackets)."""

    bytes: int
    values: int = MAX_VALUES


def index_limits(backing: int) -> Limits:
    """Of an index of shards of `backing` bytes in all: a tensor takes some 110 bytes in the index, and at least as many
    in a header."""
    return Limits(MAX_JSON_BYTES + backing // 4, MAX_VALUES + backing // 64)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> JsonObject:
    result: JsonObject = {}
    seen: dict[str, str] = {}  # an index repeats a few file names
    for key, value in pairs:
        if key in result:
            raise duplicate(key)
        result[key] = seen.setdefault(value, value) if type(value) is str else value
    return result


def duplicate(key: str) -> ValueError:
    """The error of a key that an object has twice."""
    return ValueError(f"duplicate key {escape(key)!r}")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # 1e999: JSON by its grammar, and infinite once read
        raise ValueError(f"{text[:40]} is out of range")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite)
_PYTHONS = json.JSONDecoder(object_pairs_hook=_no_duplicates)  # with NaN and Infinity
_SPACE = re.compile(r"[ \t\n\r]*")


def _check_cost(data: bytes | bytearray | memoryview, *, limits: Limits, what: str) -> None:
    """What a few bytes can cost in memory and time, before they are parsed."""
    data = bytes(data) if isinstance(data, memoryview) else data
    size = len(data) if data.isascii() else 4 * len(data)  # one character beyond the BMP makes all four bytes wide
    values = sum(data.count(mark) for mark in (b",", b"{", b"["))
    if size > limits.bytes or values > limits.values:
        raise LimitError(
            f"{what}: {len(data)} bytes, about {values} values: too large to be of a checkpoint",
            hint="The file is damaged or hostile.",
        )


def parse_json(
    data: bytes | bytearray | memoryview,
    *,
    what: str,
    hint: str = "",
    limits: Limits | None = None,
    constants: bool = False,
) -> Any:
    """Parse UTF-8 JSON strictly; with `constants` NaN and Infinity are numbers, as in Python. Raises InputError that
    names `what`; with `limits` also for what is beyond them, without parsing it."""
    if limits is not None:
        _check_cost(data, limits=limits, what=what)
    try:
        text = bytes(data).decode("utf-8")
        del data
        value = (_PYTHONS if constants else _DECODER).decode(text)
        if "\\u" in text:  # an escaped half of a surrogate pair is no character: it could not be written again
            _check_characters(value)
        return value
    except RecursionError:
        raise InputError(f"{what}: nested too deeply", hint=hint or "The file is damaged or hostile.") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise InputError(
            f"{what}: not valid JSON ({escape(error)})", hint=hint or "Correct it, or download it again."
        ) from None


def parse_items(data: bytes | bytearray, *, what: str, limits: Limits) -> Iterator[tuple[str, Any]]:
    """The members of a JSON object one after the other, as strictly as `parse_json`: none of them is kept here, so that
    an object of a million small ones takes the memory of its text. Raises InputError; a caller that keeps the keys
    refuses one that comes twice.
    """
    _check_cost(data, limits=limits, what=what)
    try:
        text = data.decode("utf-8")
        del data
        escapes, at = "\\u" in text, _skip(text, 0)
        if text[at : at + 1] != "{":
            _DECODER.decode(text)  # says what is wrong with it
            raise InputError(f"{what} is not a JSON object", hint="Download it again.")
        at = _skip(text, at + 1)
        if text[at : at + 1] == "}":
            _end(text, at + 1)
            return
        while True:
            _expect(text, at, '"', "property name enclosed in double quotes")
            key, at = scanstring(text, at + 1, True)
            at = _skip(text, at)
            _expect(text, at, ":", "':' delimiter")
            value, at = _value(text, _skip(text, at + 1))
            if escapes:
                _check_characters([key, value])
            yield key, value
            at = _skip(text, at)
            if text[at : at + 1] == "}":
                _end(text, at + 1)
                return
            _expect(text, at, ",", "',' delimiter")
            at = _skip(text, at + 1)
    except RecursionError:
        raise InputError(f"{what}: nested too deeply", hint="The file is damaged or hostile.") from None
    except ValueError as error:
        raise InputError(
            f"{what}: not valid JSON ({escape(error)})", hint="Correct it, or download it again."
        ) from None


def _skip(text: str, at: int) -> int:
    if text[at : at + 1] > " ":
        return at
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


def _expect(text: str, at: int, mark: str, what: str) -> None:
    if text[at : at + 1] != mark:
        raise json.JSONDecodeError(f"Expecting {what}", text, at)


def _value(text: str, at: int) -> tuple[Any, int]:
    try:
        found: tuple[Any, int] = _DECODER.scan_once(text, at)  # type: ignore[attr-defined] # typeshed leaves it out
        return found
    except StopIteration as error:
        raise json.JSONDecodeError("Expecting value", text, error.value) from None


def _end(text: str, at: int) -> None:
    if _skip(text, at) != len(text):
        raise json.JSONDecodeError("Extra data", text, at)


def _check_characters(value: object) -> None:
    """An escaped half of a surrogate pair is no character: it could not be written again. Raises ValueError."""
    json.dumps(value, ensure_ascii=False).encode("utf-8")


def read_json_object(path: Path, *, what: str, limits: Limits | None = None, constants: bool = False) -> JsonObject:
    """Read a JSON object from a file. Raises InputError when missing, too large or not an object."""
    limits = limits or Limits(MAX_JSON_BYTES)
    try:
        size = path.stat().st_size
        if size > limits.bytes:
            raise LimitError(f"{what}: {size} bytes is too large", hint="The file is damaged.")
        value = parse_json(path.read_bytes(), what=what, limits=limits, constants=constants)
    except FileNotFoundError:
        raise InputError(f"{what} is missing", hint="Is this a checkpoint directory?") from None
    except OSError as error:
        raise InputError(f"cannot read {what}: {error.strerror}", hint="Check permissions.") from None
    if not isinstance(value, dict):
        raise InputError(f"{what}: expected a JSON object, found {type(value).__name__}", hint="Download it again.")
    return value


def canonical_json(value: object) -> bytes:
    """One byte sequence for one value: sorted keys, no spaces, ASCII, Infinity as in Python. For hashes and ids."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
