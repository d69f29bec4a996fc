"""The one place that prints. stdout carries the result and nothing else; stderr carries the rest.

Three modes: a table for people, one JSON object with --json, the output path alone with -q.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moeconv.errors import MoeconvError, escape


@dataclass
class Sink:
    """How this run speaks. `mode` is "human", "json" or "quiet"."""

    mode: str = "human"
    verbose: bool = False

    def result(self, value: Mapping[str, Any], *, table: Callable[[Mapping[str, Any]], Any]) -> None:
        """Print a step's result in this run's mode, its warnings on stderr."""
        for text in value.get("warnings", ()):
            self.warn(text)
        if self.mode == "json":
            self._out(json.dumps(_finite(value), ensure_ascii=True, allow_nan=False))
        elif self.mode == "quiet":
            self._out(str(value.get("output") or value.get("path") or ""))
        else:
            from rich.console import Console

            console = Console(file=sys.stdout, highlight=False, soft_wrap=not sys.stdout.isatty())
            made = table(value)
            for part in made if isinstance(made, list) else [made]:
                console.print(part)
            sys.stdout.flush()

    def error(self, error: MoeconvError) -> None:
        """Print an error: one JSON object on stdout with --json, else one or two lines on stderr."""
        if self.mode == "json":
            self._out(json.dumps({"error": {"code": error.exit_code, "message": error.message, "hint": error.hint}}))
            return
        print(f"moeconv: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  {error.hint}", file=sys.stderr)

    def warn(self, text: str) -> None:
        print(f"warning: {escape(text)}", file=sys.stderr)

    def _out(self, text: str) -> None:
        print(text, flush=True)


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
