"""How a long step reports its progress. The command line draws it; callers of the library may ignore it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol


class Meter(Protocol):
    """The calls that a long step makes, from any thread. Its `parts` are shards when it writes, layers when it
    measures, and steps when it trains; `total_bytes` is in whatever `advance` counts. With `tokens`, the rate is in
    tokens per second."""

    def start(self, *, total_bytes: int, parts: int, unit: str = "shard", tokens: int = 0) -> None: ...

    def advance(self, nbytes: int) -> None: ...

    def part_done(self) -> None: ...

    def figure(self, name: str, value: float) -> None: ...

    def note(self, text: str) -> None: ...


class SilentMeter:
    """Reports nothing."""

    def start(self, *, total_bytes: int, parts: int, unit: str = "shard", tokens: int = 0) -> None:
        pass

    def advance(self, nbytes: int) -> None:
        pass

    def part_done(self) -> None:
        pass

    def figure(self, name: str, value: float) -> None:
        pass

    def note(self, text: str) -> None:
        pass


@dataclass
class Progress:
    """The progress of a step: `done` of `total` (bytes or training steps), `part` of `parts` finished. `unit` is shard,
    layer, sequence or step; `tokens` is their number in `total`, 0 where nothing runs on text. `figures` are the latest
    figures, such as the training loss. `note` is the last line of text."""

    unit: str = "shard"
    part: int = 0
    parts: int = 0
    done: int = 0
    total: int = 0
    tokens: int = 0
    began: float = field(default_factory=time.monotonic)
    figures: dict[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    @property
    def share(self) -> float:
        """The share that is done, from 0 to 1."""
        return self.done / self.total if self.total else 0.0

    @property
    def eta(self) -> float | None:
        """Seconds that are left at the rate so far; None before anything is done."""
        return self.seconds * (1 / self.share - 1) if self.share else None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens that ran through the whole model, per second; None where nothing runs on text."""
        return self.tokens * self.share / max(self.seconds, 1e-9) if self.tokens else None


class CallbackMeter:
    """Calls `progress` with a Progress at every change, from one thread at a time. Without it, texts are logged."""

    def __init__(self, progress: Callable[[Progress], None] | None = None) -> None:
        self._lock, self._state = threading.RLock(), Progress()
        self._progress, self._log = progress, logging.getLogger("moeconv")

    def start(self, *, total_bytes: int, parts: int, unit: str = "shard", tokens: int = 0) -> None:
        with self._lock:
            self._state = Progress(unit=unit, parts=parts, total=total_bytes, tokens=tokens)
            self._tell()

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self._state.done += nbytes
            self._tell()

    def part_done(self) -> None:
        with self._lock:
            self._state.part += 1
            self._tell()

    def figure(self, name: str, value: float) -> None:
        with self._lock:
            self._state.figures[name] = value

    def note(self, text: str) -> None:
        self._log.info("%s", text)
        with self._lock:
            self._state.note = text
            self._tell()

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self._state)
