"""How a long step reports its progress. The command line draws it; callers of the library may ignore it."""

from __future__ import annotations

from typing import Protocol


class Meter(Protocol):
    """The calls of a long step, from any thread. Its `parts` are shards when it writes, and layers when it measures."""

    def start(self, *, total_bytes: int, parts: int, unit: str = "shard") -> None: ...

    def advance(self, nbytes: int) -> None: ...

    def part_done(self) -> None: ...

    def note(self, text: str) -> None: ...


class SilentMeter:
    """Reports nothing."""

    def start(self, *, total_bytes: int, parts: int, unit: str = "shard") -> None:
        pass

    def advance(self, nbytes: int) -> None:
        pass

    def part_done(self) -> None:
        pass

    def note(self, text: str) -> None:
        pass
