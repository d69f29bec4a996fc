"""How the loop tells of its progress. The command line draws it; a library caller may ignore it."""

from __future__ import annotations

from typing import Protocol


class Meter(Protocol):
    """What the loop calls, from any thread."""

    def start(self, *, total_bytes: int, shards: int) -> None: ...

    def advance(self, nbytes: int) -> None: ...

    def shard_done(self, name: str) -> None: ...

    def note(self, text: str) -> None: ...


class SilentMeter:
    """Says nothing."""

    def start(self, *, total_bytes: int, shards: int) -> None:
        pass

    def advance(self, nbytes: int) -> None:
        pass

    def shard_done(self, name: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass
