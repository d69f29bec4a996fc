"""The one exception tree of moeconv: every error carries a message, a hint and an exit code.

What went wrong and where stands in the message; what to do next stands in the hint.
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
    """A checkpoint of an architecture that no step takes; it may be whole (exit 3)."""


class LimitError(InputError):
    """A file that is more than moeconv reads (exit 3). What it has written itself is kept, not thrown away."""


class OutputError(MoeconvError):
    """The output cannot be written: it exists, the disk is full, permission is missing (exit 4)."""

    exit_code = 4


class CheckError(MoeconvError):
    """A check failed: verify, a gate of evaluate, or a promise of the plan (exit 5)."""

    exit_code = 5


class Interrupted(BaseException):
    """SIGINT or SIGTERM stopped the work; finished shards are kept (exit 130 or 143).

    It can arise in any line, also of a library, so it is no Exception that one on the way would take for its own.
    """

    def __init__(self, message: str, *, hint: str = "", signal_number: int = 2) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = 128 + signal_number


_LONGEST = 600  # characters of a name that a message repeats


def escape(text: object) -> str:
    """A name that came from a file, made safe to print: control and non-printing characters become escapes, and a
    name that is longer than any message should be loses its middle."""
    safe = "".join(ch if ch.isprintable() else ch.encode("unicode_escape").decode() for ch in str(text))
    return safe if len(safe) <= _LONGEST else f"{safe[:400]} ... {safe[-100:]}"


def first_line(error: BaseException) -> str:
    """What another package's error says, made safe to print and short: the first line of its message, else its kind."""
    lines = str(error).strip().splitlines()
    return escape((lines[0] if lines else type(error).__name__)[:300])


def closest(word: object, known: Iterable[object]) -> str | None:
    """The known word that is most like this one, whatever the case of its letters; None where none is alike."""
    by_letters = {str(k).lower(): str(k) for k in known}
    close = difflib.get_close_matches(str(word).lower(), by_letters, n=1)
    return by_letters[close[0]] if close else None


def did_you_mean(word: object, known: Iterable[object]) -> str:
    """A hint that names the closest known word, or all of them."""
    words = [str(k) for k in known]
    close = closest(word, words)
    return f"Did you mean {close}?" if close else f"Known: {', '.join(sorted(words))}."
