"""What `--data` names: text and .jsonl files, directories, standard input, hub data sets -> texts with provenance.

One value is one source, with one weight: a directory's files are joined, so give files one by one to tell them apart.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeconv.checkpoint.strictjson import parse_json
from moeconv.data.hubdata import read_hub
from moeconv.errors import InputError, UsageError, escape

JSONL_SUFFIXES = (".jsonl", ".ndjson")
TEXT_SUFFIXES = (".txt", ".text", ".md", *JSONL_SUFFIXES)
CHAT_FIELD = "messages"


@dataclass(frozen=True)
class TextSource:
    """One `--data` value. A text is a string, or a list of chat messages for the tokenizer's template.

    `name` is a base name, never a path: statistics are handed around.
    """

    name: str
    sha256: str
    weight: float
    texts: tuple[Any, ...]


def read_sources(
    values: list[str] | tuple[str, ...], *, text_field: str = "text", hub_bytes: int | None = None
) -> list[TextSource]:
    """Read every `--data` value; of a hub data set the first records, until they hold `hub_bytes` (None: all).

    Raises UsageError for a bad value, InputError for a bad file.
    """
    if not values:
        raise UsageError("no data given", hint="Pass --data FILE (text or .jsonl), a directory, or - for stdin.")
    split = [split_weight(value) for value in values]
    if sum(path == "-" for path, _ in split) > 1:
        raise UsageError("standard input is named twice", hint="Give - once.")
    return [_read_source(path, weight, text_field, hub_bytes) for path, weight in split]


def split_weight(value: str) -> tuple[str, float]:
    """`FILE=WEIGHT` -> (FILE, WEIGHT); weight 1 when there is none. A file whose name has a `=` wins."""
    path, equals, tail = value.rpartition("=")
    if not equals or not path or os.path.exists(value):
        return value, 1.0
    try:
        weight = float(tail)
    except ValueError:
        return value, 1.0
    if not (weight > 0 and math.isfinite(weight)):
        raise UsageError(f"--data {escape(value)}: the weight must be a positive number", hint="Example: code.txt=2.")
    return path, weight


def _read_source(value: str, weight: float, text_field: str, hub_bytes: int | None) -> TextSource:
    if value.startswith("hf://"):
        name, sha256, records = read_hub(value, limit=hub_bytes)
        texts = [text_of(r, f"{escape(name)}, record {n}", text_field) for n, r in enumerate(records, 1)]
        return TextSource(name, sha256, weight, tuple(texts))
    if value == "-":
        data = sys.stdin.buffer.read()
        return TextSource("-", hashlib.sha256(data).hexdigest(), weight, _parse(data, "standard input", text_field))
    path = Path(value)
    if path.is_dir():
        return _read_directory(path, weight, text_field)
    data = _read_file(path)
    return TextSource(path.name, hashlib.sha256(data).hexdigest(), weight, _parse(data, path.name, text_field))


def _read_directory(directory: Path, weight: float, text_field: str) -> TextSource:
    files = sorted(p for p in directory.iterdir() if p.suffix.lower() in TEXT_SUFFIXES and p.is_file())
    files = [p for p in files if not p.name.startswith(".")]
    if not files:
        raise InputError(
            f"--data {escape(directory)}: no {', '.join(TEXT_SUFFIXES)} file in it", hint="Name a file instead."
        )
    digest = hashlib.sha256()
    texts: list[Any] = []
    for path in files:
        data = _read_file(path)
        digest.update(f"{path.name}\0{hashlib.sha256(data).hexdigest()}\n".encode())
        texts += _parse(data, path.name, text_field)
    return TextSource(Path(os.path.abspath(directory)).name, digest.hexdigest(), weight, tuple(texts))


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"--data {escape(path)} does not exist", hint="Check the path.") from None
    except OSError as error:
        raise InputError(f"--data {escape(path)}: {error.strerror}", hint="Check its permissions.") from None


def _parse(data: bytes, name: str, text_field: str) -> tuple[Any, ...]:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{escape(name)} is not UTF-8 text (byte {error.start})", hint="Convert it to UTF-8 text or .jsonl."
        ) from None
    if not text.strip():
        raise InputError(f"{escape(name)} is empty", hint="Give a file with text in it.")
    if not name.lower().endswith(JSONL_SUFFIXES):
        return (text,)
    lines = enumerate(text.split("\n"), 1)
    return tuple(_record(line, f"{escape(name)}, line {n}", text_field) for n, line in lines if line.strip())


def _record(line: str, where: str, text_field: str) -> Any:
    """The text of one .jsonl record: a string, or a list of messages."""
    record = parse_json(line.encode(), what=where, hint="Each line must be one JSON object.")
    if not isinstance(record, dict):
        raise InputError(f"{where}: not a JSON object", hint='A line looks like {"text": "..."}.')
    return text_of(record, where, text_field)


def text_of(record: Mapping[str, Any], where: str, text_field: str) -> Any:
    """The text of a record: a string, or a list of messages. Raises InputError where the field holds neither."""
    field = CHAT_FIELD if text_field not in record and text_field == "text" else text_field
    value = record.get(field)
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(m, dict) and "role" in m for m in value):
        return value
    fields = ", ".join(escape(key) for key in list(record)[:8]) or "none"
    raise InputError(
        f"{where}: no text in field {escape(text_field)!r} (fields: {fields})",
        hint="Name the field with --text-field.",
    )
