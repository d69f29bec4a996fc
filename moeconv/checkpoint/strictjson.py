"""JSON as moeconv accepts it from files it did not write: bounded, no duplicate keys, no half characters, and NaN and
Infinity only where Python's own JSON is what others write (config.json)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from moeconv.errors import InputError, escape

# the largest known index (207,000 tensors) takes 22 MB; 40 MiB in each of the three forms that parsing holds at once
# (bytes, text, values) stay within 200 MB, and so do the objects of 500,000 values
MAX_JSON_BYTES = 40 << 20
MAX_VALUES = 500_000


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key {escape(key)!r}")
        result[key] = value
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # 1e999: JSON by its grammar, and infinite once read
        raise ValueError(f"{text[:40]} is out of range")
    return value


def _check_cost(data: bytes | bytearray | memoryview, *, limit: int, what: str) -> None:
    """What a few bytes can cost in memory and time, before they are parsed."""
    data = bytes(data)
    size = len(data) if data.isascii() else 4 * len(data)  # one character beyond the BMP makes all four bytes wide
    values = sum(data.count(mark) for mark in (b",", b"{", b"["))
    if size > limit or values > MAX_VALUES:
        raise InputError(
            f"{what}: {len(data)} bytes, about {values} values: too large to be of a checkpoint",
            hint="The file is damaged or hostile.",
        )


def parse_json(
    data: bytes | bytearray | memoryview,
    *,
    what: str,
    hint: str = "",
    limit: int | None = None,
    constants: bool = False,
) -> Any:
    """Parse UTF-8 JSON strictly; with `constants` NaN and Infinity are numbers, as in Python. Raises InputError that
    names `what`; with `limit` also for what is larger than that many bytes or than MAX_VALUES values, without parsing
    it."""
    if limit is not None:
        _check_cost(data, limit=limit, what=what)
    try:
        text = bytes(data).decode("utf-8")
        numbers: dict[str, Any] = {} if constants else {"parse_constant": _no_constant, "parse_float": _finite}
        value = json.loads(text, object_pairs_hook=_no_duplicates, **numbers)
        if "\\u" in text:  # an escaped half of a surrogate pair is no character: it could not be written again
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except RecursionError:
        raise InputError(f"{what}: nested too deeply", hint=hint or "The file is damaged or hostile.") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise InputError(
            f"{what}: not valid JSON ({escape(error)})", hint=hint or "Correct it, or download it again."
        ) from None


def read_json_object(path: Path, *, what: str, constants: bool = False) -> dict[str, Any]:
    """Read a JSON object from a file. Raises InputError when missing, too large or not an object."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise InputError(f"{what}: {size} bytes is too large", hint="The file is damaged.")
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{what} is missing", hint="Is this a checkpoint directory?") from None
    except OSError as error:
        raise InputError(f"cannot read {what}: {error.strerror}", hint="Check permissions.") from None
    value = parse_json(data, what=what, limit=MAX_JSON_BYTES, constants=constants)
    if not isinstance(value, dict):
        raise InputError(f"{what}: expected a JSON object, found {type(value).__name__}", hint="Download it again.")
    return value


def canonical_json(value: Any) -> bytes:
    """One byte sequence for one value: sorted keys, no spaces, ASCII, Infinity as in Python. For hashes and ids."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
