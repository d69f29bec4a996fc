"""No command may write where it reads. The declarations of the options state which of them are paths to read."""

from __future__ import annotations

from collections.abc import Iterable

from moeconv.checkpoint.hub import cache
from moeconv.checkpoint.target import check_apart


def guard(out: str, reads: Iterable[tuple[str, str]]) -> None:
    """Refuse an OUT that is, contains or is inside a path that the command reads; for names on the hub, that is its
    cache. `reads` are (name for messages, path). Raises OutputError.
    """
    check_apart(out, [_local(word, path) for word, path in reads], staging=True)


def _local(word: str, path: str) -> tuple[str, str]:
    return (f"the hub's cache of {word} {path}:", cache()) if path.startswith("hf://") else (word, path)
