"""Turns the bytes of a file into texts, by its content: JSON, JSON lines, a table, Parquet, compressed or plain text.

A suffix such as .jsonl determines the kind of a file, so that a damaged file is refused. Without a suffix, or with that
of plain text, the content determines the kind, and a text that only begins like JSON or a table is plain text.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator

from moeconv.checkpoint.strictjson import parse_json
from moeconv.data.records import Text, chat_of, fields_of, is_chat, text_of
from moeconv.data.unpack import unpacked
from moeconv.errors import InputError, escape, first_line
from moeconv.types import JsonObject

JSONL_SUFFIXES = (".jsonl", ".ndjson")
TABLE_SUFFIXES = {".csv": ",", ".tsv": "\t"}
PLAIN_SUFFIXES = (".txt", ".text", ".md")
_DELIMITERS = (",", "\t", ";")
_BEGINS_AS_JSON = re.compile(r'\s*(\[\s*)?\{\s*"(?:[^"\\]|\\.)*"\s*:')
_AS_TEXT = 'To use it as plain text, put it into a record {"text": ...} of a .jsonl file.'
_Parsed = tuple[Text, ...]
Json = object  # a decoded JSON value


def parse_texts(data: bytes, name: str, text_field: str) -> _Parsed:
    """The texts of one file. `name` is its base name, or "standard input".

    Raises InputError, with the file and the line, for content that cannot be read as its kind.
    """
    data, inner = unpacked(data, name)
    if data[:4] == data[-4:] == b"PAR1":
        return _parquet(data, name, text_field)
    text = _decoded(data, name)
    if not text.strip():
        raise InputError(f"{escape(name)} is empty", hint="Give a file with text in it.")
    plain = text
    text = text.removeprefix("\ufeff")  # the byte order mark of Excel, which belongs to no record
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
    """The texts of a file whose content determines its kind; None for plain text. Content that only begins like JSON or
    a table is plain text if the suffix of the file allows it (`may_be_text`), and is otherwise refused as damaged."""
    for read in (_json, _json_lines):
        found = read(text, name, text_field)
        if found is not None:
            return found
    if not may_be_text and _BEGINS_AS_JSON.match(text):
        parse_json(text.encode(), what=f"{escape(name)} begins as JSON", hint="Check that the file is complete.")
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
    """The reader for a suffix, which refuses content of another kind; None if the content determines the kind."""
    if suffix in JSONL_SUFFIXES:
        return _declared_lines
    if suffix == ".json":
        return _declared_json
    if suffix in TABLE_SUFFIXES:
        return lambda text, name, field: _rows(text, name, field, _delimiter(text, TABLE_SUFFIXES[suffix]))
    return None


def _decoded(data: bytes, name: str) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(
            f"{escape(name)} is UTF-16 text, and only UTF-8 is read",
            hint="Convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW.",
        )
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
        found = _json_lines(text, name, text_field)  # data sets on the hub often have JSON lines in .json files
    if found is not None:
        return found
    parse_json(text.encode(), what=escape(name), hint="Check that the file is complete.")
    raise InputError(
        f"{escape(name)} is JSON without records",
        hint='Give a list of records such as [{"text": "..."}], or of strings, or one record per line.',
    )


def _json(text: str, name: str, text_field: str) -> _Parsed | None:
    """The texts of one JSON value that contains records or strings; None if the text is no such value."""
    if text.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        value = parse_json(text.encode(), what=name)
    except InputError:
        return None
    if isinstance(value, dict):
        return _json_object(value, escape(name), text_field)
    return _json_array(value, escape(name), text_field)


def _json_array(items: list[Json], where: str, text_field: str) -> _Parsed | None:
    """The texts of a list of strings, of records, or of chats (lists of messages); None for any other list."""
    if not items or not all(isinstance(item, (str, dict)) or is_chat(item) for item in items):
        return None
    if is_chat(items):
        return (chat_of(items, where),)
    texts: list[Text] = []
    for n, item in enumerate(items, 1):
        at = f"{where}, record {n}"
        if isinstance(item, str):
            texts.append(item)
        elif isinstance(item, dict):
            texts.append(text_of(item, at, text_field))
        elif is_chat(item):
            texts.append(chat_of(item, at))
    return tuple(texts)


def _json_object(record: JsonObject, where: str, text_field: str) -> _Parsed | None:
    """The texts of one JSON object: a record, a column of texts, or an object around one list of records.

    Raises InputError for an object without texts, and for one with several lists.
    """
    field = next((name for name in fields_of(text_field) if name in record), None)
    value = None if field is None else record[field]
    column = _column_of_texts(value)
    if column is not None:
        return column
    if not (isinstance(value, str) or is_chat(value)):
        found = _texts_of_list(record, where, text_field)
        if found is not None:
            return found
    return (text_of(record, where, text_field),)  # for a record without texts, this raises an error with its fields


def _column_of_texts(value: Json) -> _Parsed | None:
    """The texts of a list of strings, or of {"0": "...", "1": "..."}, as pandas writes a column; None for others."""
    values = list(value.values()) if isinstance(value, dict) else value
    if isinstance(values, list) and values and all(isinstance(text, str) for text in values):
        return tuple(values)
    return None


def _texts_of_list(record: JsonObject, where: str, text_field: str) -> _Parsed | None:
    """The texts of the only list in an object; None if it has no list of records or strings."""
    lists = {key: v for key, v in record.items() if isinstance(v, list) and v and isinstance(v[0], (dict, list, str))}
    if len(lists) > 1:
        raise InputError(
            f"{where} is a JSON object with several lists ({', '.join(escape(key) for key in list(lists)[:8])})",
            hint=f"Write the list that is meant to a file of its own. {_AS_TEXT}",
        )
    for key, items in lists.items():
        return _json_array(items, f"{where}, {escape(key)!r}", text_field)
    return None


def _declared_lines(text: str, name: str, text_field: str) -> _Parsed:
    if text.lstrip()[:1] == "[":  # one JSON list in a file for JSON lines
        found = _json(text, name, text_field)
        if found is not None:
            return found
    return tuple(_line(line, f"{escape(name)}, line {n}", text_field) for n, line in _numbered(text))


def _json_lines(text: str, name: str, text_field: str) -> _Parsed | None:
    """The texts of JSON lines; None if fewer than half of the lines are JSON objects. Otherwise, a line that is not a
    JSON object is refused, because the file is damaged."""
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
        raise InputError(f"{where} is not a JSON object", hint='Each line must look like {"text": "..."}.')
    return text_of(record, where, text_field)


# -- tables ------------------------------------------------------------------------------------------------------------


def _delimiter(text: str, usual: str) -> str:
    """The delimiter of a file with a table's suffix: the usual one, or another one if only that occurs in the
    header."""
    header = text.split("\n", 1)[0]
    return usual if usual in header else next((d for d in _DELIMITERS if d in header), usual)


def _delimiter_of_header(text: str, text_field: str) -> str | None:
    """The delimiter that divides the first line into columns, one of which is the text field; None if there is none."""
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
                    f"{where}, line {reader.line_num}: the row has {len(row)} cells, and the header has {len(columns)}",
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
        hint="The first line must name the columns. Name the column with the text by --text-field.",
    )


def _parquet(data: bytes, name: str, text_field: str) -> _Parsed:
    where = escape(name)
    try:
        from pyarrow import parquet
    except ImportError:
        raise InputError(
            f"{where} is a Parquet file, and the package `pyarrow` is not installed",
            hint="Run pip install pyarrow, or convert the file to JSON lines.",
        ) from None
    try:
        file = parquet.ParquetFile(io.BytesIO(data))
        column = _column(list(file.schema_arrow.names), where, text_field)
        rows = file.read(columns=[name for name in (column, "system") if name in file.schema_arrow.names]).to_pylist()
    except InputError:
        raise
    except Exception as error:  # a damaged file can make the package raise anything
        raise InputError(
            f"{where} is a Parquet file that cannot be read: {first_line(error)}",
            hint="Check that the file is complete.",
        ) from error
    if not rows:
        raise InputError(f"{where} is empty: no rows", hint="Give a file with text in it.")
    return tuple(text_of(row, f"{where}, row {n}", column) for n, row in enumerate(rows, 1))
