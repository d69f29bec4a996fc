"""What no command may do: write where it reads. The options say which of them are paths that are read."""

from __future__ import annotations

from collections.abc import Iterable

from moeconv.checkpoint.hub import cache
from moeconv.checkpoint.target import check_apart


def guard(out: str, reads: Iterable[tuple[str, str]]) -> None:
    """Refuse an OUT that is, holds or lies in a path that is read; of hub names that is the hub's cache.

    `reads` are (the word that names it, the path). Raises OutputError.
    """
    check_apart(out, [_local(word, path) for word, path in reads], staging=True)


def _local(word: str, path: str) -> tuple[str, str]:
    return (f"the hub's cache of {word} {path}:", cache()) if path.startswith("hf://") else (word, path)
