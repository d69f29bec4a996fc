"""Decompresses data files, recognised by their first bytes: gzip, bzip2, xz and zstd. Archives are refused by name."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import IO, Protocol

from moeconv.errors import InputError, escape

MAX_UNPACKED = 8 << 30  # a file of a few bytes can decompress to more than any memory can hold
_CHUNK = 1 << 20


class Readable(Protocol):
    """A decompressor as a file."""

    def read(self, size: int, /) -> bytes: ...


Opener = Callable[[IO[bytes]], AbstractContextManager[Readable]]


def _zstd(file: IO[bytes]) -> AbstractContextManager[Readable]:
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        import zstandard

        return zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
    return zstd.ZstdFile(file)


_OPENERS: tuple[tuple[bytes, str, tuple[str, ...], Opener], ...] = (
    (b"\x1f\x8b", "gzip", (".gz",), lambda file: gzip.GzipFile(fileobj=file)),
    (b"BZh91AY&SY", "bzip2", (".bz2",), bz2.BZ2File),
    (b"\xfd7zXZ\x00", "xz", (".xz",), lzma.LZMAFile),
    (b"\x28\xb5\x2f\xfd", "zstd", (".zst", ".zstd"), _zstd),
)
UNPACKED_SUFFIXES = tuple(suffix for _, _, suffixes, _ in _OPENERS for suffix in suffixes)
_REFUSED = (
    (b"PK\x03\x04", "a zip archive (or an office document)", "Unpack it, and give the text files in it."),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "Unpack it, and give the text files in it."),
    (b"%PDF-", "a PDF document", "Extract its text, for example: pdftotext FILE NEW."),
    (b"ARROW1\0\0", "an Arrow file", "Convert it to Parquet or JSON lines."),
    (b"SQLite format 3\0", "an SQLite database", "Export the table as CSV or JSON lines."),
)


def unpacked(data: bytes, name: str) -> tuple[bytes, str]:
    """(the bytes, decompressed if they are compressed; the name of the file without the suffix of the compression).

    Raises InputError for an archive, for a damaged file, and for more than MAX_UNPACKED bytes.
    """
    where = escape(name)
    for magic, method, suffixes, opener in _OPENERS:
        if data.startswith(magic):
            plain = _read(data, where, method, opener)
            stem = next((name[: -len(s)] for s in suffixes if name.lower().endswith(s)), name)
            _refuse_archives(plain, where)
            return plain, stem
    _refuse_archives(data, where)
    return data, name


def _read(data: bytes, where: str, method: str, opener: Opener) -> bytes:
    pieces = []
    size = 0
    try:
        with opener(io.BytesIO(data)) as file:
            while chunk := file.read(_CHUNK):
                size += len(chunk)
                if size > MAX_UNPACKED:
                    raise InputError(
                        f"{where} decompresses to more than {MAX_UNPACKED / 2**30:g} GiB",
                        hint="Decompress it, and give a part of it.",
                    )
                pieces.append(chunk)
    except InputError:
        raise
    except ImportError:
        raise InputError(
            f"{where} is compressed by {method}, and the package `zstandard` is not installed",
            hint="Run pip install zstandard, or decompress the file: zstd -d FILE.",
        ) from None
    except Exception as error:  # OSError, EOFError, LZMAError, zlib.error or ZstdError, all for a damaged file
        raise InputError(
            f"{where}: the {method} data cannot be decompressed: {escape(error)}",
            hint="Check that the file is complete.",
        ) from error
    return b"".join(pieces)


def _refuse_archives(data: bytes, where: str) -> None:
    for magic, kind, hint in _REFUSED:
        if data.startswith(magic):
            raise InputError(f"{where} is {kind}", hint=hint)
    if data[257:262] == b"ustar":
        raise InputError(f"{where} is a tar archive", hint="Unpack it, and give the text files in it.")
