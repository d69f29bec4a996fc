"""The one place that prints. stdout carries the result and nothing else; stderr carries the rest.

Three modes: a table for people, one JSON object with --json, the output path alone with -q.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moeconv.errors import Interrupted, MoeconvError, OutputError, escape

_WIDE = 4096  # columns of a pipe or file: a path stays on one line


def open_streams() -> None:
    """A standard stream that our caller closed reads as empty, and what is written to it goes nowhere."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (for the life of the process)


def say(text: str) -> None:
    """One line on stderr. That nobody reads it must not end the work."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


@dataclass
class Sink:
    """How this run speaks. `mode` is "human", "json" or "quiet"; `deaf` once stdout has refused a write; `mute` in all
    processes but the first of a command that several share."""

    mode: str = "human"
    verbose: bool = False
    deaf: bool = False
    mute: bool = False

    def result(self, value: Mapping[str, Any], *, table: Callable[[Any], Any]) -> None:
        """Print a step's result in this run's mode, its warnings on stderr."""
        if self.mute:
            return
        for text in value.get("warnings", ()):
            self.warn(text)
        if self.verbose:
            self._details(value)
        if self.mode == "json":
            self._out(json.dumps(_finite(value), ensure_ascii=True, allow_nan=False))
        elif self.mode == "quiet":
            # a path's bytes as they are, also those that are no characters
            self._out(str(value.get("output") or value.get("path") or ""), errors="surrogateescape")
        else:
            from rich.console import Console

            # rich ends the program when a reader has had enough; the exit code is not its business
            with self.printing(), contextlib.suppress(SystemExit):
                # names from files are text, not markup
                wide = None if sys.stdout.isatty() else _WIDE
                console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False, width=wide)
                made = table(value)
                for part in made if isinstance(made, list) else [made]:
                    console.print(part)

    def _details(self, value: Mapping[str, Any]) -> None:
        """What -v adds on stderr: identities and hashes, which nobody wants to read but to compare."""
        for key in ("plan_id", "identity", "tensors", "seconds", "peak_rss_bytes"):
            if key in value:
                say(f"{key}: {value[key]}")
        for name, digest in sorted((value.get("files") or {}).items()):
            say(f"sha256 {digest}  {escape(name)}")

    def error(self, error: MoeconvError | Interrupted) -> None:
        """Print an error: one JSON object on stdout with --json, else one or two lines on stderr."""
        if self.mute:
            return None
        if self.mode == "json" and not self.deaf:
            fields = {"code": error.exit_code, "message": error.message, "hint": error.hint}
            return self._out(json.dumps({"error": fields}))
        say(f"moeconv: {error.message}")
        if error.hint:
            say(f"  {error.hint}")

    def warn(self, text: str) -> None:
        say(f"warning: {escape(text)}")

    def _out(self, text: str, *, errors: str = "backslashreplace") -> None:
        with self.printing(errors=errors):
            print(text)

    @contextlib.contextmanager
    def printing(self, *, errors: str = "backslashreplace") -> Iterator[None]:
        """Writes to stdout. A reader that has had enough ends it quietly; raises OutputError for a full disk.

        `errors` is what becomes of characters that stdout's encoding lacks.
        """
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors=errors)
        try:
            yield
            sys.stdout.flush()
        except OSError as error:
            # what is still buffered must not fail again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if not isinstance(error, BrokenPipeError):
                self.deaf = True
                raise OutputError(
                    f"cannot write to standard output: {error.strerror}", hint="The result itself is not affected."
                ) from None


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def debug() -> bool:
    """Whether tracebacks are wanted."""
    return os.environ.get("MOECONV_DEBUG", "") not in ("", "0")
