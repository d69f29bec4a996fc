"""The hash of a file, as the manifest states it."""

from __future__ import annotations

import hashlib
from pathlib import Path

_READ = 1 << 22  # bytes at a time


def file_sha256(path: Path) -> str:
    """hex sha256 of a file's bytes, which are not held in memory. Raises OSError for a file that cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(_READ):
            digest.update(data)
    return digest.hexdigest()
