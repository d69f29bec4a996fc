"""A Plan seen as the checkpoint that it will write, so that the next step can be planned before it exists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from moeconv.checkpoint.reader import Checkpoint
from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.families.model import Model, open_model
from moeconv.plan.flow import ByteSource, make
from moeconv.plan.plan import Item, Plan


@dataclass(frozen=True)
class _PlannedCheckpoint:
    """The part of Checkpoint's face that planners use. It has no bytes to read."""

    path: Path  # of the companions, which will come along
    name: str
    config: dict[str, Any]
    tensors: dict[str, TensorRef]
    shards: tuple[str, ...]
    plan_id: str
    warnings: list[str] = field(default_factory=list)
    manifest: None = None

    @property
    def nbytes(self) -> int:
        return sum(ref.nbytes for ref in self.tensors.values())

    def beside(self) -> dict[str, bool]:
        """Names of the companions."""
        return {entry.name: entry.is_file() for entry in self.path.iterdir()} if self.path.is_dir() else {}

    def confined(self, name: str) -> Path:
        """The path of a companion."""
        return self.path / name

    def same_bytes(self, _first: str, _second: str) -> bool:
        """Asked of a tied head that is stored: the plan has untied what differs (families/head.py)."""
        return True

    def identity(self, _whole: object = ()) -> str:
        return self.plan_id


@dataclass(frozen=True)
class _MadeCheckpoint(_PlannedCheckpoint):
    """One whose bytes are made whenever they are read."""

    items: Mapping[str, Item] = field(default_factory=dict)
    origins: Mapping[str, ByteSource] = field(default_factory=dict)

    def read(self, name: str, *, start: int = 0, length: int | None = None) -> bytearray:
        (data,) = make(self.items[name], self.origins)
        view = memoryview(data).cast("B")
        return bytearray(view[start:] if length is None else view[start : start + length])

    def advise(self, names: object) -> None:
        """Nothing lies on disk that could be read ahead."""


def planned_model(
    plan: Plan, *, companions: Path | None = None, name: str = "model",
    origins: Mapping[str, ByteSource] | None = None,
) -> Model:  # fmt: skip
    """The model that `plan` will write, for planning on; reading its bytes is an AttributeError, unless the `origins`
    of the plan's inputs are given: its tensors are then made in memory, each time that one is read.

    `companions` is the directory whose tokenizer and other small files will come along, `name` the output's.
    """
    tensors = {
        spec.name: TensorRef(spec.name, spec.dtype, spec.shape, shard.name, 0, spec.nbytes)
        for shard in plan.shards
        for spec in shard.layout()
    }
    shards = tuple(shard.name for shard in plan.shards)
    about = (companions or Path("(planned)"), name, dict(plan.config), tensors, shards, plan.plan_id)
    planned = _PlannedCheckpoint(*about)
    if origins is not None:
        planned = _MadeCheckpoint(*about, items={i.outputs[0].name: i for i in plan.items()}, origins=origins)
    return open_model(cast(Checkpoint, planned))
