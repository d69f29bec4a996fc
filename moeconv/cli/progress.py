"""Progress on stderr: a live bar on a terminal, and plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING

from moeconv.cli.sink import print_error_line
from moeconv.errors import escape
from moeconv.plan.meter import Progress
from moeconv.units import human_bytes, human_seconds

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import ProgressColumn, TaskID

HEARTBEAT_SECONDS = 30.0
_SPOKEN = ("shard", "layer")  # units whose parts are few and long enough for a line each


class LineMeter:
    """Prints one line per shard or layer, and one every 30 s while a part takes longer. For pipes, logs and CI."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._state, self._last = Progress(), time.monotonic()

    def start(self, *, total_bytes: int, parts: int, unit: str = "shard", tokens: int = 0) -> None:
        self._last = time.monotonic()
        self._state = Progress(unit=unit, parts=parts, total=total_bytes, tokens=tokens)

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self._state.done += nbytes
            if time.monotonic() - self._last >= HEARTBEAT_SECONDS:
                self._print()

    def part_done(self) -> None:
        with self._lock:
            self._state.part += 1
            if self._state.unit in _SPOKEN:
                self._print()

    def figure(self, name: str, value: float) -> None:
        self._state.figures[name] = value

    def note(self, text: str) -> None:
        print_error_line(escape(text))

    def close(self) -> None:
        pass

    def _print(self) -> None:
        state, self._last = self._state, time.monotonic()
        eta = (
            f"eta {human_seconds(state.eta or 0)}" if state.done < state.total else f"in {human_seconds(state.seconds)}"
        )
        percent = 100 * state.done // max(state.total, 1)
        print_error_line("  ".join([f"{state.unit} {state.part}/{state.parts}", f"{percent}%", *rates(state), eta]))


def rates(state: Progress) -> list[str]:
    """The rate of a step in its unit, and its latest figures."""
    speed = state.tokens_per_second
    if speed is not None:
        rate = f"{speed:,.0f} tokens/s"
    elif state.unit == "step":
        rate = f"{state.done / max(state.seconds, 1e-9):.1f} steps/s"
    else:
        rate = f"{human_bytes(state.done / max(state.seconds, 1e-9))}/s"
    return [rate, *(f"{name} {value:.4f}" for name, value in state.figures.items())]


class BarMeter:
    """A live bar with position, rate and time left, or a spinner while only a text is known. For a terminal."""

    def __init__(self) -> None:
        self._progress: RichProgress | None = None
        self._task: TaskID | None = None
        self._state = Progress()
        self._lock = threading.RLock()

    def start(self, *, total_bytes: int, parts: int, unit: str = "shard", tokens: int = 0) -> None:
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

        with self._lock:
            self._state = Progress(unit=unit, parts=parts, total=total_bytes, tokens=tokens)
            columns = (BarColumn(), TextColumn("{task.percentage:3.0f}%  {task.fields[rate]}"), TimeRemainingColumn())
            self._open(*columns, text=f"{unit} 0/{parts}", total=total_bytes)

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self._state.done += nbytes
            self._draw()

    def part_done(self) -> None:
        with self._lock:
            self._state.part += 1
            self._draw()

    def figure(self, name: str, value: float) -> None:
        self._state.figures[name] = value

    def note(self, text: str) -> None:
        from rich.progress import SpinnerColumn, TimeElapsedColumn

        with self._lock:
            if self._progress is not None and self._state.done < self._state.total:
                return self._progress.console.print(escape(text), markup=False, highlight=False)
            self.close()
            print_error_line(escape(text))
            self._state = Progress()
            self._open(SpinnerColumn(), TimeElapsedColumn(), text="", total=None)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _open(self, *columns: ProgressColumn, text: str, total: int | None) -> None:
        from rich.console import Console
        from rich.progress import Progress as Bars
        from rich.progress import TextColumn

        self.close()
        shown = (TextColumn("{task.description}"), *columns)
        self._progress = Bars(*shown, console=Console(stderr=True), transient=total is None)
        self._task = self._progress.add_task(text, total=total, rate="")
        self._progress.start()

    def _draw(self) -> None:
        state = self._state
        if self._progress is not None and self._task is not None and state.total:
            self._progress.update(
                self._task, completed=state.done, description=f"{state.unit} {state.part}/{state.parts}",
                rate="  ".join(rates(state)),
            )  # fmt: skip


def make_meter() -> LineMeter | BarMeter:
    """The meter for the kind of stream that stderr is."""
    return BarMeter() if sys.stderr.isatty() else LineMeter()
