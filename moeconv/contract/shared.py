"""What several commands print: sizes, memory, and what every command that writes a checkpoint prints."""

from __future__ import annotations

from typing import Literal

from typing_extensions import NotRequired, TypedDict, final

Device = Literal["memory", "disk", "file"]


class Memory(TypedDict):
    """Bytes that running the model took (of a dry run: will take), and those that were free."""

    peak_bytes: int
    free_bytes: int
    least_bytes: NotRequired[int]  # of a dry run
    tokens: NotRequired[int]  # of a dry run
    experts: NotRequired[Device]  # of a run
    activations: NotRequired[Device]  # of a run


@final
class Foreseen(TypedDict):
    """The dry run of a command that only measures: the memory that it will take."""

    command: str
    output: NotRequired[str]  # of one that writes a file
    dry_run: bool
    memory: Memory
    warnings: list[str]


class Counts(TypedDict):
    """Parameters in all, and those that compute a token."""

    total: int
    active: int


class Written(TypedDict):
    """What every command that writes a checkpoint prints, with a block of its own."""

    command: str
    output: str
    plan_id: str | None  # null where training decides what is written
    dry_run: bool
    tensors: int
    shards: int
    bytes: int
    parameters: Counts
    changed: dict[str, int]
    seconds: float
    peak_rss_bytes: int
    warnings: list[str]
    files: dict[str, str]
    memory: NotRequired[Memory]  # of a dry run that would run the model
    part: NotRequired[str]  # with --part
    complete: NotRequired[bool]
