"""Bytes -> texts, by what they hold: JSON records, JSON lines, a table, Parquet, compressed files, plain text.

A file's suffix says what it should be, so that a damaged file is refused; without one, or with that of a text, the
content decides, and what only begins like JSON or a table is text.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator
from typing import Any

from moeconv.checkpoint.strictjson import parse_json
from moeconv.data.records import Text, chat_of, fields_of, is_chat, text_of
from moeconv.data.unpack import unpacked
from moeconv.errors import InputError, escape, first_line

JSONL_SUFFIXES = (".jsonl", ".ndjson")
TABLE_SUFFIXES = {".csv": ",", ".tsv": "\t"}
PLAIN_SUFFIXES = (".txt", ".text", ".md")
_DELIMITERS = (",", "\t", ";")
_BEGINS_AS_JSON = re.compile(r'\s*(\[\s*)?\{\s*"(?:[^"\\]|\\.)*"\s*:')
_AS_TEXT = 'To use it as plain text, put it into a record {"text": ...} of a .jsonl file.'
_Parsed = tuple[Text, ...]


def parse_texts(data: bytes, name: str, text_field: str) -> _Parsed:
    """The texts of one file; `name` is its base name, or "standard input". Raises InputError that names file and line
    for what cannot be read as what it is."""
    data, inner = unpacked(data, name)
    if data[:4] == data[-4:] == b"PAR1":
        return _parquet(data, name, text_field)
    text = _decoded(data, name)
    if not text.strip():
        raise InputError(f"{escape(name)} is empty", hint="Give a file with text in it.")
    plain = text
    text = text.removeprefix("\ufeff")  # Excel's mark of UTF-8: part of no record
    suffix = _suffix(inner)
    read = _declared(suffix)
    if read is not None:
        return read(text, name, text_field)
    try:
        found = _recognised(text, name, text_field, may_be_text=suffix in PLAIN_SUFFIXES)
    except InputError as error:
        raise InputError(error.message, hint=f"{error.hint} {_AS_TEXT}") from error
    return (plain,) if found is None else found


def _recognised(text: str, name: str, text_field: str, *, may_be_text: bool) -> _Parsed | None:
    """What the content alone shows; None for plain text. What only begins like JSON or a table is text where the
    file's suffix says so, and else refused: it is damaged."""
    for read in (_json, _json_lines):
        found = read(text, name, text_field)
        if found is not None:
            return found
    if not may_be_text and _BEGINS_AS_JSON.match(text):
        parse_json(text.encode(), what=f"{escape(name)} begins as JSON", hint="Is it complete?")
    delimiter = _delimiter_of_header(text, text_field)
    if delimiter is None:
        return None
    try:
        return _rows(text, name, text_field, delimiter)
    except InputError:
        if not may_be_text:
            raise
    return None


def _suffix(name: str) -> str:
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 else ""


def _declared(suffix: str) -> Callable[[str, str, str], _Parsed] | None:
    """The reader that a suffix asks for, which refuses what is not of its kind; None where the content decides."""
    if suffix in JSONL_SUFFIXES:
        return _declared_lines
    if suffix == ".json":
        return _declared_json
    if suffix in TABLE_SUFFIXES:
        return lambda text, name, field: _rows(text, name, field, _delimiter(text, TABLE_SUFFIXES[suffix]))
    return None


def _decoded(data: bytes, name: str) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(f"{escape(name)} is UTF-16 text", hint="Convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{escape(name)} is not UTF-8 text (byte {error.start})",
            hint="Give UTF-8 text, JSON, JSON lines, CSV or Parquet (each also compressed by gzip, zstd, bzip2 or xz).",
        ) from None


# -- JSON --------------------------------------------------------------------------------------------------------------


def _declared_json(text: str, name: str, text_field: str) -> _Parsed:
    found = _json(text, name, text_field)
    if found is None:
        found = _json_lines(text, name, text_field)  # hubs hold JSON lines under .json
    if found is not None:
        return found
    parse_json(text.encode(), what=escape(name), hint="Is the file complete?")
    raise InputError(
        f"{escape(name)}: JSON without records",
        hint='Give a list of records such as [{"text": "..."}], or of strings, or one record a line.',
    )


def _json(text: str, name: str, text_field: str) -> _Parsed | None:
    """The texts of one JSON value that holds records or strings; None when the text is no such value."""
    if text.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        value = parse_json(text.encode(), what=name)
    except InputError:
        return None
    if isinstance(value, dict):
        return _json_object(value, escape(name), text_field)
    return _json_array(value, escape(name), text_field)


def _json_array(items: list[Any], where: str, text_field: str) -> _Parsed | None:
    """A list of strings, of records, or of chats (lists of messages)."""
    if not items or not all(isinstance(item, (str, dict)) or is_chat(item) for item in items):
        return None
    if is_chat(items):
        return (chat_of(items, where),)
    texts: list[Text] = []
    for n, item in enumerate(items, 1):
        at = f"{where}, record {n}"
        if isinstance(item, str):
            texts.append(item)
        else:
            texts.append(chat_of(item, at) if isinstance(item, list) else text_of(item, at, text_field))
    return tuple(texts)


def _json_object(record: dict[str, Any], where: str, text_field: str) -> _Parsed | None:
    """One record, a column of texts, or an object around one list of records."""
    field = next((name for name in fields_of(text_field) if name in record), None)
    value = None if field is None else record[field]
    if isinstance(value, dict) and value and all(isinstance(v, str) for v in value.values()):
        return tuple(value.values())  # {"text": {"0": "...", "1": "..."}}: columns, as pandas writes them
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        return tuple(value)
    if isinstance(value, str) or is_chat(value):
        return (text_of(record, where, text_field),)
    lists = {key: v for key, v in record.items() if isinstance(v, list) and v and isinstance(v[0], (dict, list, str))}
    if len(lists) > 1:
        raise InputError(
            f"{where}: a JSON object with several lists ({', '.join(escape(key) for key in list(lists)[:8])})",
            hint=f"Write the one that is meant to a file of its own. {_AS_TEXT}",
        )
    for key, items in lists.items():
        found = _json_array(items, f"{where}, {escape(key)!r}", text_field)
        if found is not None:
            return found
    return (text_of(record, where, text_field),)  # refuses, and names the fields


def _declared_lines(text: str, name: str, text_field: str) -> _Parsed:
    if text.lstrip()[:1] == "[":  # a list under the suffix of lines
        found = _json(text, name, text_field)
        if found is not None:
            return found
    return tuple(_line(line, f"{escape(name)}, line {n}", text_field) for n, line in _numbered(text))


def _json_lines(text: str, name: str, text_field: str) -> _Parsed | None:
    """The texts of JSON lines; None when fewer than half of the lines are JSON objects. A line that is none among
    others that are is refused: it is damaged."""
    if text.lstrip()[:1] != "{":
        return None
    lines = list(_numbered(text))
    objects = sum(_is_object(line) for _, line in lines)
    if 2 * objects < len(lines) or len(lines) < 2:
        return None
    return tuple(_line(line, f"{escape(name)}, line {n}", text_field) for n, line in lines)


def _numbered(text: str) -> Iterator[tuple[int, str]]:
    return ((n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip())


def _is_object(line: str) -> bool:
    if line.lstrip()[:1] != "{" or line.rstrip()[-1:] != "}":
        return False
    try:
        return isinstance(parse_json(line.encode(), what=""), dict)
    except InputError:
        return False


def _line(line: str, where: str, text_field: str) -> Text:
    """The text of one record of JSON lines."""
    record = parse_json(line.encode(), what=where, hint="Each line must be one JSON object.")
    if not isinstance(record, dict):
        raise InputError(f"{where}: not a JSON object", hint='A line looks like {"text": "..."}.')
    return text_of(record, where, text_field)


# -- tables ------------------------------------------------------------------------------------------------------------


def _delimiter(text: str, usual: str) -> str:
    """The delimiter of a declared table: its usual one, or another that the header alone is cut by."""
    header = text.split("\n", 1)[0]
    return usual if usual in header else next((d for d in _DELIMITERS if d in header), usual)


def _delimiter_of_header(text: str, text_field: str) -> str | None:
    """The delimiter by which the first line is two or more columns, one of them the text field; None: no table."""
    header = text.split("\n", 1)[0].rstrip("\r")
    for delimiter in _DELIMITERS:
        columns = [column.strip('"') for column in header.split(delimiter)]
        if len(columns) > 1 and any(field in columns for field in fields_of(text_field)):
            return delimiter
    return None


def _rows(text: str, name: str, text_field: str, delimiter: str) -> _Parsed:
    csv.field_size_limit(1 << 31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    where = escape(name)
    texts: list[Text] = []
    try:
        columns = next(reader)
        column = _column(columns, where, text_field)
        for row in reader:
            if not row:
                continue
            if len(row) != len(columns):
                raise InputError(
                    f"{where}, line {reader.line_num}: {len(row)} cells, and the header has {len(columns)}",
                    hint="Quote cells that hold the delimiter or line breaks, or give JSON lines.",
                )
            texts.append(text_of(dict(zip(columns, row)), f"{where}, line {reader.line_num}", column))
    except csv.Error as error:
        raise InputError(
            f"{where}, line {reader.line_num}: not a table ({escape(error)})",
            hint="Quote cells that hold the delimiter or line breaks, or give JSON lines.",
        ) from None
    if not texts:
        raise InputError(f"{where} is empty: a header without rows", hint="Give a file with text in it.")
    return tuple(texts)


def _column(columns: list[str], where: str, text_field: str) -> str:
    for field in fields_of(text_field):
        if field in columns:
            return field
    raise InputError(
        f"{where}: no column {escape(text_field)!r} (columns: {', '.join(escape(c) for c in columns[:8])})",
        hint="The first line names the columns. Name the one of the text with --text-field.",
    )


def _parquet(data: bytes, name: str, text_field: str) -> _Parsed:
    where = escape(name)
    try:
        from pyarrow import parquet
    except ImportError:
        raise InputError(
            f"{where} is a Parquet file, and the package `pyarrow` is not installed",
            hint="pip install pyarrow, or convert it to JSON lines.",
        ) from None
    try:
        file = parquet.ParquetFile(io.BytesIO(data))
        column = _column(list(file.schema_arrow.names), where, text_field)
        rows = file.read(columns=[name for name in (column, "system") if name in file.schema_arrow.names]).to_pylist()
    except InputError:
        raise
    except Exception as error:  # whatever a damaged file makes the package raise: it is the input's fault
        raise InputError(
            f"{where}: a Parquet file that does not read: {first_line(error)}",
            hint="Is the file complete?",
        ) from error
    if not rows:
        raise InputError(f"{where} is empty: no rows", hint="Give a file with text in it.")
    return tuple(text_of(row, f"{where}, row {n}", column) for n, row in enumerate(rows, 1))
