"""Refuses an output path that overlaps with what the command reads, as the declarations of its options state it."""

from __future__ import annotations

from collections.abc import Iterable

from moeconv.checkpoint.hub import cache
from moeconv.checkpoint.target import check_apart


def guard(out: str, reads: Iterable[tuple[str, str]]) -> None:
    """Raises OutputError if OUT is, contains or is inside a path that the command reads.

    `reads` are (argument or option, path). For a model on the hub (hf://), the path is the hub's cache.
    """
    check_apart(out, [_local(word, path) for word, path in reads], staging=True)


def _local(word: str, path: str) -> tuple[str, str]:
    return (f"the hub's cache of {word} {path}:", cache()) if path.startswith("hf://") else (word, path)
