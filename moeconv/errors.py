"""The one exception tree of moeconv: every error carries a message, a hint and an exit code.

The message states what went wrong and where; the hint states what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MoeconvError(Exception):
    """Base of all errors that moeconv raises on purpose. `exit_code` is the process's exit status."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(MoeconvError):
    """The command, flag, recipe or argument is wrong (exit 2)."""

    exit_code = 2


class InputError(MoeconvError):
    """A checkpoint, data file or artifact is missing, corrupt, unsupported or unsafe (exit 3)."""

    exit_code = 3


class Unsupported(InputError):
    """A checkpoint of an architecture or quantization that no step accepts, though it may be undamaged (exit 3)."""


class LimitError(InputError):
    """A file that exceeds the limits of what moeconv reads (exit 3). Files that moeconv itself wrote are kept."""


class OutputError(MoeconvError):
    """The output cannot be written: it exists, the disk is full, permission is missing (exit 4)."""

    exit_code = 4


class CheckError(MoeconvError):
    """A check failed: verify, a gate of evaluate, or a promise of the plan (exit 5)."""

    exit_code = 5


class Interrupted(BaseException):
    """SIGINT or SIGTERM stopped the work; finished shards are kept (exit 130 or 143).

    A signal can arrive at any line, also inside a library. It is not an Exception, so no handler of a library catches
    it.
    """

    def __init__(self, message: str, *, hint: str = "", signal_number: int = 2) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = 128 + signal_number


_LONGEST = 600  # characters of a name in a message


def escape(text: object) -> str:
    """A name from a file, made safe to print: non-printing characters become escapes, and a very long name loses its
    middle."""
    safe = "".join(ch if ch.isprintable() else ch.encode("unicode_escape").decode() for ch in str(text))
    return safe if len(safe) <= _LONGEST else f"{safe[:400]} ... {safe[-100:]}"


def first_line(error: BaseException) -> str:
    """The first line of another package's error message, or the name of its class; short and safe to print."""
    lines = str(error).strip().splitlines()
    return escape((lines[0] if lines else type(error).__name__)[:300])


def closest(word: object, known: Iterable[object]) -> str | None:
    """The known word that is most similar to `word`, ignoring case; None if none is similar."""
    by_letters = {str(k).lower(): str(k) for k in known}
    close = difflib.get_close_matches(str(word).lower(), by_letters, n=1)
    return by_letters[close[0]] if close else None


def did_you_mean(word: object, known: Iterable[object]) -> str:
    """A hint that names the closest known word, or all of them."""
    words = [str(k) for k in known]
    close = closest(word, words)
    return f"Did you mean {close}?" if close else f"Known: {', '.join(sorted(words))}."
