"""The JSON that several commands share: sizes, memory, and the result of every command that writes a checkpoint."""

from __future__ import annotations

from typing import Literal, NotRequired, final

from typing_extensions import TypedDict

Device = Literal["memory", "disk", "file"]


class Memory(TypedDict):
    """Bytes of memory that running the model took (in a dry run: will take), and bytes that were free."""

    peak_bytes: int
    free_bytes: int
    least_bytes: NotRequired[int]  # in a dry run
    tokens: NotRequired[int]  # in a dry run
    experts: NotRequired[Device]  # without --dry-run
    activations: NotRequired[Device]  # without --dry-run


@final
class Foreseen(TypedDict):
    """The result of a dry run of a command that only measures: the memory that the command will take."""

    command: str
    output: NotRequired[str]  # for a command that writes a file
    dry_run: bool
    memory: Memory
    warnings: list[str]


class Counts(TypedDict):
    """The number of all parameters, and of those that are used for one token."""

    total: int
    active: int


class Written(TypedDict):
    """What every command that writes a checkpoint prints, together with a block of its own."""

    command: str
    output: str
    plan_id: str | None  # null if training decides what is written
    dry_run: bool
    tensors: int
    shards: int
    bytes: int
    parameters: Counts
    changed: dict[str, int]
    seconds: float  # of the whole command; 0 in a dry run
    phases: NotRequired[dict[str, float]]  # the seconds of each phase, without --dry-run
    peak_rss_bytes: int
    warnings: list[str]
    files: dict[str, str]
    memory: NotRequired[Memory]  # in a dry run of a command that runs the model
    part: NotRequired[str]  # with --part
    complete: NotRequired[bool]
