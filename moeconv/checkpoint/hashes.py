"""The hash of a file, as the manifest states it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

_READ = 1 << 22  # bytes at a time


def file_sha256(path: Path, *, seen: Callable[[int], None] | None = None) -> str:
    """hex sha256 of a file's bytes, which are not held in memory. `seen` is called with the number of each block's
    bytes. Raises OSError for a file that cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(_READ):
            digest.update(data)
            if seen is not None:
                seen(len(data))
    return digest.hexdigest()
