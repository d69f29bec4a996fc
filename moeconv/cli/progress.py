"""Progress on stderr: a live bar on a terminal, and plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING

from moeconv.cli.sink import print_error_line
from moeconv.errors import escape
from moeconv.units import human_bytes, human_seconds

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

HEARTBEAT_SECONDS = 30.0


class LineMeter:
    """Prints one line per shard, and one every 30 s while a shard takes longer. For pipes, logs and CI."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._began = self._last = time.monotonic()
        self._total = self._done = self._parts = self._parts_done = 0
        self._unit = "shard"

    def start(self, *, total_bytes: int, parts: int, unit: str = "shard") -> None:
        self._began = self._last = time.monotonic()
        self._total, self._parts, self._unit, self._done, self._parts_done = total_bytes, parts, unit, 0, 0

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            if time.monotonic() - self._last >= HEARTBEAT_SECONDS:
                self._print()

    def part_done(self) -> None:
        with self._lock:
            self._parts_done += 1
            self._print()

    def note(self, text: str) -> None:
        print_error_line(escape(text))

    def close(self) -> None:
        pass

    def _print(self) -> None:
        now = self._last = time.monotonic()
        rate = self._done / max(now - self._began, 1e-9)
        left = (self._total - self._done) / rate if rate else 0.0
        share = 100 * self._done // max(self._total, 1)
        eta = f"eta {human_seconds(left)}" if self._done < self._total else f"in {human_seconds(now - self._began)}"
        print_error_line(f"{self._unit} {self._parts_done}/{self._parts}  {share}%  {human_bytes(rate)}/s  {eta}")


class BarMeter:
    """A live bar with bytes, rate and time left. For a terminal."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def start(self, *, total_bytes: int, parts: int, unit: str = "shard") -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self.close()
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._progress = Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True))
        self._task = self._progress.add_task(f"{parts} {unit}{'s' * (parts != 1)}", total=total_bytes)
        self._progress.start()

    def advance(self, nbytes: int) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, nbytes)

    def part_done(self) -> None:
        pass

    def note(self, text: str) -> None:
        self.close()
        print_error_line(escape(text))

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def make_meter() -> LineMeter | BarMeter:
    """The meter for the kind of stream that stderr is."""
    return BarMeter() if sys.stderr.isatty() else LineMeter()
