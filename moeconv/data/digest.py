"""The hash of the content that a value of --data or --stats names. It identifies what was measured on the content."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import TextIO

from moeconv.checkpoint.hashes import file_sha256
from moeconv.errors import InputError, escape

_stdin: tuple[TextIO, bytes] | None = None  # the stream that was read, and its bytes


def read_stdin() -> bytes:
    """All bytes of standard input. It can be read only once, so they are kept for later calls."""
    global _stdin
    if _stdin is None or _stdin[0] is not sys.stdin:
        _stdin = (sys.stdin, sys.stdin.buffer.read())
    return _stdin[1]


def content_of(value: str, *, flag: str = "--data") -> str:
    """The hex sha256 of the weight and the bytes of a file, of the files of a directory with their names, of standard
    input (`-`), or of the name of a data set on the hub. Raises InputError for a file that cannot be read."""
    from moeconv.data.texts import split_weight

    path, weight = split_weight(value)
    digest = hashlib.sha256(f"{weight}\n".encode())
    if path.startswith("hf://"):
        digest.update(path.encode())
    elif path == "-":
        digest.update(read_stdin())
    elif os.path.isdir(path):
        for file in sorted(p for p in Path(path).iterdir() if p.is_file()):
            digest.update(f"{file.name}\n{_hash(file, flag)}\n".encode(errors="surrogateescape"))
    else:
        digest.update(_hash(Path(path), flag).encode())
    return digest.hexdigest()


def _hash(path: Path, flag: str) -> str:
    try:
        return file_sha256(path)
    except FileNotFoundError:
        raise InputError(f"{flag} {escape(path)} does not exist", hint="Check the path.") from None
    except OSError as error:
        raise InputError(f"{flag} {escape(path)}: {error.strerror}", hint="Check its permissions.") from None
