"""Reads what --data names (files, directories, standard input, data sets on the hub) as texts with their provenance.

One value is one source with one weight. The files of a directory are joined, so that they count as one source.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path

from moeconv.data.digest import read_stdin
from moeconv.data.hubdata import read_hub
from moeconv.data.recognise import JSONL_SUFFIXES, PLAIN_SUFFIXES, TABLE_SUFFIXES, parse_texts
from moeconv.data.records import Text, text_of
from moeconv.data.unpack import UNPACKED_SUFFIXES
from moeconv.errors import InputError, UsageError, escape

TEXT_SUFFIXES = (*PLAIN_SUFFIXES, *JSONL_SUFFIXES)
# files with these suffixes are read if they are named, but not as part of a directory
DATA_SUFFIXES = (*TABLE_SUFFIXES, ".json", ".parquet", *UNPACKED_SUFFIXES)
NOTE_SUFFIXES = (".md",)  # the card of a data set


@dataclass(frozen=True)
class TextSource:
    """The texts of one value of --data. A text is a string, or a chat for the template of the tokenizer.

    `name` is a base name and never a path, because it is written into statistics, which people pass on.
    """

    name: str
    sha256: str
    weight: float
    texts: tuple[Text, ...]


def read_sources(
    values: list[str] | tuple[str, ...], *, text_field: str = "text", hub_bytes: int | None = None
) -> list[TextSource]:
    """Read all values of --data. Of a data set on the hub, the first records are read, up to `hub_bytes` bytes (None:
    all).

    Raises UsageError for a value that cannot be used, InputError for a file that cannot be read.
    """
    if not values:
        raise UsageError(
            "no data was given", hint="Pass --data with a file (text or .jsonl), a directory, or - for standard input."
        )
    split = [split_weight(value) for value in values]
    if sum(path == "-" for path, _ in split) > 1:
        raise UsageError("standard input is named twice, and can be read only once", hint="Pass --data - once.")
    return [_read_source(path, weight, text_field, hub_bytes) for path, weight in split]


def split_weight(value: str) -> tuple[str, float]:
    """(FILE, WEIGHT) of a value `FILE=WEIGHT`; the weight is 1 if there is none. If a file of the whole name exists,
    the value is its name."""
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
        data = read_stdin()
        return TextSource(
            "-", hashlib.sha256(data).hexdigest(), weight, parse_texts(data, "standard input", text_field)
        )
    path = Path(value)
    if path.is_dir():
        return _read_directory(path, weight, text_field)
    data = _read_file(path)
    return TextSource(path.name, hashlib.sha256(data).hexdigest(), weight, parse_texts(data, path.name, text_field))


def _read_directory(directory: Path, weight: float, text_field: str) -> TextSource:
    files = _files_of(directory)
    digest = hashlib.sha256()
    texts: list[Text] = []
    for path in files:
        data = _read_file(path)
        digest.update(f"{path.name}\0{hashlib.sha256(data).hexdigest()}\n".encode())
        texts += parse_texts(data, path.name, text_field)
    return TextSource(Path(os.path.abspath(directory)).name, digest.hexdigest(), weight, tuple(texts))


def _files_of(directory: Path) -> list[Path]:
    """The text files of a directory. Raises InputError if there are none, or if there are only notes (.md) beside data
    files, because the notes would be read instead of the data."""
    files = sorted(p for p in directory.iterdir() if p.is_file() and not p.name.startswith("."))
    texts = [p for p in files if p.suffix.lower() in TEXT_SUFFIXES]
    others = [p for p in files if p.suffix.lower() in DATA_SUFFIXES]
    named = f" ({', '.join(escape(p.name) for p in others[:4])})" if others else ""
    if not texts:
        raise InputError(
            f"--data {escape(directory)}: the directory has no {', '.join(TEXT_SUFFIXES)} file",
            hint=f"Name a file instead{named}.",
        )
    if others and all(p.suffix.lower() in NOTE_SUFFIXES for p in texts):
        raise InputError(
            f"--data {escape(directory)}: {escape(texts[0].name)} is beside data files{named}, which are only read "
            f"if they are named",
            hint="Pass one --data per file.",
        )
    return texts


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"--data {escape(path)} does not exist", hint="Check the path.") from None
    except OSError as error:
        raise InputError(f"--data {escape(path)}: {error.strerror}", hint="Check its permissions.") from None
