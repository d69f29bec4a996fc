"""How the loop tells of its progress. The command line draws it; a library caller may ignore it."""

from __future__ import annotations

from typing import Protocol


class Meter(Protocol):
    """What a long step calls, from any thread. Its `parts` are shards when it writes, layers when it measures."""

    def start(self, *, total_bytes: int, parts: int, unit: str = "shard") -> None: ...

    def advance(self, nbytes: int) -> None: ...

    def part_done(self) -> None: ...

    def note(self, text: str) -> None: ...


class SilentMeter:
    """Says nothing."""

    def start(self, *, total_bytes: int, parts: int, unit: str = "shard") -> None:
        pass

    def advance(self, nbytes: int) -> None:
        pass

    def part_done(self) -> None:
        pass

    def note(self, text: str) -> None:
        pass
