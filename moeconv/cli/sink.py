"""The only module that prints. The result goes to stdout and nothing else does; all other text goes to stderr.

There are three modes: a table for people, one JSON object with --json, and the output path alone with -q.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeconv.errors import Interrupted, MoeconvError, OutputError, escape

if TYPE_CHECKING:
    from rich.console import RenderableType

_WIDE = 4096  # columns of a pipe or a file, so that a path stays on one line


def open_streams() -> None:
    """Replace a standard stream that the caller closed: it reads as empty, and what is written to it is discarded."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (for the life of the process)


def print_error_line(text: str) -> None:
    """Print one line on stderr. The work continues if nobody reads it."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


@dataclass
class Sink:
    """How this run prints. `mode` is "human", "json" or "quiet". `stdout_failed` is set once a write to stdout failed.
    `silent` is set in all processes but the first one of a command that several processes share."""

    mode: str = "human"
    verbose: bool = False
    stdout_failed: bool = False
    silent: bool = False

    def result(self, value: Mapping[str, object], *, table: Callable[[Any], Sequence[RenderableType]]) -> None:
        """Print a result in this run's mode: `table` makes what people see. Its warnings go to stderr."""
        if self.silent:
            return
        if isinstance(warnings := value.get("warnings"), list | tuple):
            for text in warnings:
                self.warn(text)
        if self.verbose:
            self._details(value)
        if self.mode == "json":
            self._out(json.dumps(_finite(value), ensure_ascii=True, allow_nan=False))
        elif self.mode == "quiet":
            # the bytes of a path are printed unchanged, even where they are not valid characters
            self._out(str(value.get("output") or value.get("path") or ""), errors="surrogateescape")
        else:
            from rich.console import Console

            # rich ends the program when the reader of a pipe is gone; the exit code stays ours
            with self.printing(), contextlib.suppress(SystemExit):
                # names from files are text, not markup
                wide = None if sys.stdout.isatty() else _WIDE
                console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False, width=wide)
                for part in table(value):
                    console.print(part)

    def _details(self, value: Mapping[str, object]) -> None:
        """What -v adds on stderr: identities, hashes and sizes."""
        for key in ("plan_id", "identity", "tensors", "seconds", "peak_rss_bytes"):
            if key in value:
                print_error_line(f"{key}: {value[key]}")
        phases = value.get("phases")
        for name, seconds in phases.items() if isinstance(phases, Mapping) else ():
            print_error_line(f"  {name}: {seconds}")
        files = value.get("files")
        for name, digest in sorted(files.items()) if isinstance(files, Mapping) else ():
            print_error_line(f"sha256 {digest}  {escape(name)}")

    def error(self, error: MoeconvError | Interrupted) -> None:
        """Print an error: one JSON object on stdout with --json, else one or two lines on stderr."""
        if self.silent:
            return None
        if self.mode == "json" and not self.stdout_failed:
            fields = {"code": error.exit_code, "message": error.message, "hint": error.hint}
            return self._out(json.dumps({"error": fields}))
        print_error_line(f"moeconv: {error.message}")
        if error.hint:
            print_error_line(f"  {error.hint}")

    def warn(self, text: str) -> None:
        print_error_line(f"warning: {escape(text)}")

    def _out(self, text: str, *, errors: str = "backslashreplace") -> None:
        with self.printing(errors=errors):
            print(text)

    @contextlib.contextmanager
    def printing(self, *, errors: str = "backslashreplace") -> Iterator[None]:
        """A block that writes to stdout. It ends without an error when the reader of a pipe is gone. Raises OutputError
        for other failures, such as a full disk.

        `errors` states how characters are printed that the encoding of stdout lacks.
        """
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors=errors)
        try:
            yield
            sys.stdout.flush()
        except OSError as error:
            # otherwise Python would write the rest of the buffer at exit, and fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if not isinstance(error, BrokenPipeError):
                self.stdout_failed = True
                raise OutputError(
                    f"cannot write to standard output: {error.strerror}", hint="The result itself is not affected."
                ) from None


def _finite(value: object) -> object:
    """`value` with null in place of NaN and infinity, which JSON lacks."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def debug() -> bool:
    """Whether MOECONV_DEBUG asks for tracebacks."""
    return os.environ.get("MOECONV_DEBUG", "") not in ("", "0")
