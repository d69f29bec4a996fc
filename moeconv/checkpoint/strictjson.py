"""JSON as moeconv accepts it from files it did not write: bounded, no duplicate keys, no NaN, no half characters."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from moeconv.errors import InputError, escape

MAX_JSON_BYTES = 256 * 1024 * 1024


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


def parse_json(data: bytes | bytearray | memoryview, *, what: str, hint: str = "") -> Any:
    """Parse UTF-8 JSON strictly. Raises InputError that names `what`."""
    try:
        text = bytes(data).decode("utf-8")
        value = json.loads(
            text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite
        )  # fmt: skip
        if "\\u" in text:  # an escaped half of a surrogate pair is no character: it could not be written again
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except RecursionError:
        raise InputError(f"{what}: nested too deeply", hint=hint or "The file is damaged or hostile.") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise InputError(f"{what}: not valid JSON ({escape(error)})", hint=hint or "Download it again.") from None


def read_json_object(path: Path, *, what: str) -> dict[str, Any]:
    """Read a JSON object from a file. Raises InputError when missing, too large or not an object."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise InputError(f"{what}: {size} bytes is too large for {escape(path.name)}", hint="The file is damaged.")
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{what}: {escape(path.name)} is missing", hint="Is this a checkpoint directory?") from None
    except OSError as error:
        raise InputError(f"{what}: cannot read {escape(path.name)}: {error.strerror}", hint="") from None
    value = parse_json(data, what=what)
    if not isinstance(value, dict):
        raise InputError(f"{what}: expected a JSON object, found {type(value).__name__}", hint="Download it again.")
    return value


def canonical_json(value: Any) -> bytes:
    """One byte sequence for one value: sorted keys, no spaces, ASCII. For hashes and ids."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()
