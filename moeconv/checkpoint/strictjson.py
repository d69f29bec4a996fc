"""A strict JSON parser for files that moeconv did not write.

It limits the size, and refuses duplicate keys and unpaired surrogates. NaN and Infinity are accepted only in files that
other tools write with Python's json module (config.json).

The limits grow with the data that the JSON describes. So a header or index of a large model is read however many
tensors it names, while a small checkpoint cannot make the parser use much memory or time.
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

# Limits for JSON that describes no data. The parser holds 40 MiB as bytes, as text and as values at the same time,
# which is less than 200 MB; the objects of 500,000 values take less than that too.
MAX_JSON_BYTES = 40 << 20
MAX_VALUES = 500_000


@dataclass(frozen=True)
class Limits:
    """The largest JSON text that is parsed: bytes that its characters take in memory, and number of values.

    Values are estimated as the number of commas and opening brackets.
    """

    bytes: int
    values: int = MAX_VALUES


def index_limits(backing: int) -> Limits:
    """The limits for the index of shards that have `backing` bytes in total.

    A tensor takes about 110 bytes in the index, and at least as many in the header of its shard.
    """
    return Limits(MAX_JSON_BYTES + backing // 4, MAX_VALUES + backing // 64)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> JsonObject:
    seen: dict[str, str] = {}  # an index repeats a few file names: share one string per name
    result = {key: seen.setdefault(value, value) if type(value) is str else value for key, value in pairs}
    if len(result) < len(pairs):
        before: set[str] = set()
        for key, _ in pairs:
            if key in before:
                raise duplicate(key)
            before.add(key)
    return result


def duplicate(key: str) -> ValueError:
    """The error for a key that an object has twice."""
    return ValueError(f"duplicate key {escape(key)!r}")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # 1e999 is grammatical JSON, and Python reads it as infinity
        raise ValueError(f"{text[:40]} is out of range")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite)
_PYTHONS = json.JSONDecoder(object_pairs_hook=_no_duplicates)  # with NaN and Infinity
_SPACE = re.compile(r"[ \t\n\r]*")


def _check_cost(data: bytes | bytearray | memoryview, *, limits: Limits, what: str) -> None:
    """Raise LimitError, before parsing, for JSON beyond the limits: a short text can take much memory and time."""
    data = bytes(data) if isinstance(data, memoryview) else data
    size = len(data) if data.isascii() else 4 * len(data)  # Python may store every character in four bytes
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
    """Parse UTF-8 JSON strictly; with `constants`, NaN and Infinity are numbers, as in Python.

    Raises InputError, whose message begins with `what`, for invalid JSON, and LimitError, without parsing, for JSON
    beyond `limits`.
    """
    if limits is not None:
        _check_cost(data, limits=limits, what=what)
    try:
        text = bytes(data).decode("utf-8")
        del data
        value = (_PYTHONS if constants else _DECODER).decode(text)
        if "\\u" in text:  # an unpaired surrogate can only come from an escape
            _check_characters(value)
        return value
    except RecursionError:
        raise InputError(f"{what}: nested too deeply", hint=hint or "The file is damaged or hostile.") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise InputError(
            f"{what}: not valid JSON ({escape(error)})", hint=hint or "Correct it, or download it again."
        ) from None


def parse_items(
    data: bytes | bytearray, *, what: str, limits: Limits, usual: re.Pattern[str] | None = None
) -> Iterator[tuple[str, Any]]:
    """The (key, value) members of a JSON object one after the other, parsed as strictly as by `parse_json`.

    No member is kept here, so that an object with a million small members takes no more memory than its text. Therefore
    the caller must check for duplicate keys. A member that `usual` matches is not parsed: its value is the match, whose
    first group is the key. The pattern must match valid JSON only, and no backslash.

    Raises InputError for invalid JSON, LimitError beyond `limits`.
    """
    _check_cost(data, limits=limits, what=what)
    try:
        text = data.decode("utf-8")
        del data
        escapes, at = "\\u" in text, _skip(text, 0)
        if text[at : at + 1] != "{":
            _DECODER.decode(text)  # raises the error, if the text is not JSON at all
            raise InputError(f"{what} is not a JSON object", hint="Download it again.")
        at = _skip(text, at + 1)
        if text[at : at + 1] == "}":
            _end(text, at + 1)
            return
        while True:
            if usual is not None and (match := usual.match(text, at)):
                yield match[1], match
                at = match.end()
                if text[at : at + 2] == ',"':  # the usual separator
                    at += 1
                    continue
            else:
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
    """Raises ValueError for an unpaired surrogate, which is not a character and cannot be written again as UTF-8."""
    json.dumps(value, ensure_ascii=False).encode("utf-8")


def read_json_object(path: Path, *, what: str, limits: Limits | None = None, constants: bool = False) -> JsonObject:
    """Read a JSON object from a file. Raises InputError if the file is missing, too large or not a JSON object."""
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
    """The JSON of a value for hashes and ids: equal values give equal bytes (sorted keys, no spaces, ASCII only)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
