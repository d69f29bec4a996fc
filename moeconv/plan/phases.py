"""Where the time of a command goes: code names its phases, and the runner of a command reads the seconds of each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

REST = "other"  # opening, planning, imports: time outside of all named phases


@dataclass
class Clock:
    """Seconds by phase. A phase inside another one counts for itself alone, so that the phases add up to the whole."""

    seconds: dict[str, float] = field(default_factory=dict)
    _stack: list[str] = field(default_factory=lambda: [REST])
    _since: float = field(default_factory=time.monotonic)

    def enter(self, name: str) -> None:
        self._count()
        self._stack.append(name)

    def leave(self) -> None:
        self._count()
        self._stack.pop()

    def total(self) -> float:
        """Seconds since the start."""
        self._count()
        return sum(self.seconds.values())

    def _count(self) -> None:
        now = time.monotonic()
        name = self._stack[-1]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


_clock: ContextVar[Clock | None] = ContextVar("clock", default=None)


@contextmanager
def timing() -> Iterator[Clock]:
    """A block whose time is counted. Blocks inside it, such as the steps of a recipe, have clocks of their own."""
    token = _clock.set(clock := Clock())
    try:
        yield clock
    finally:
        _clock.reset(token)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A block that is one phase of the command that runs. Also a decorator."""
    clock = _clock.get()
    if clock is None:
        yield
        return
    clock.enter(name)
    try:
        yield
    finally:
        clock.leave()
