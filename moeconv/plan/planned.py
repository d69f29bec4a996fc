"""A plan as the checkpoint that it will write, so that the next step can be planned before the files exist."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self, cast

from moeconv.checkpoint.reader import Checkpoint
from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.families.model import Model, open_model
from moeconv.plan.flow import ByteSource, make
from moeconv.plan.plan import Item, Plan
from moeconv.types import JsonObject


@dataclass(frozen=True)
class _PlannedCheckpoint:
    """What planners use of Checkpoint. It has no bytes to read."""

    path: Path  # of the companions, which will be copied to the output
    name: str
    config: JsonObject
    tensors: dict[str, TensorRef]
    shards: tuple[str, ...]
    plan_id: str
    warnings: list[str] = field(default_factory=list)
    manifest: None = None

    @property
    def nbytes(self) -> int:
        return sum(ref.nbytes for ref in self.tensors.values())

    def beside(self) -> dict[str, bool]:
        """The names of the entries beside the shards, and whether each is a file."""
        return {entry.name: entry.is_file() for entry in self.path.iterdir()} if self.path.is_dir() else {}

    def confined(self, name: str) -> Path:
        """The path of a companion."""
        return self.path / name

    def reworded(self, config: JsonObject, warning: str) -> Self:
        """A copy with another config.json, and with one more `warning`."""
        return replace(self, config=config, warnings=[*self.warnings, warning])

    def same_bytes(self, _first: str, _second: str) -> bool:
        """Always true: it is asked about a stored head that is tied, and the plan has untied a head that differs
        (families/head.py)."""
        return True

    def is_zero(self, _name: str) -> bool:
        """Always true: it is asked about tensors that only the family with experts has, which the plan has filled."""
        return True

    def identity(self, _whole: object = ()) -> str:
        return self.plan_id


@dataclass(frozen=True)
class _MadeCheckpoint(_PlannedCheckpoint):
    """A planned checkpoint whose tensors are made in memory when they are read."""

    items: Mapping[str, Item] = field(default_factory=dict)
    origins: Mapping[str, ByteSource] = field(default_factory=dict)

    def read(self, name: str, *, start: int = 0, length: int | None = None) -> bytearray:
        (data,) = make(self.items[name], self.origins)
        view = memoryview(data).cast("B")
        return bytearray(view[start:] if length is None else view[start : start + length])

    def read_into(self, name: str, view: memoryview, *, start: int = 0) -> None:
        """Fill `view` with the bytes of a tensor from byte `start` on."""
        view[:] = self.read(name, start=start, length=len(view))[: len(view)]

    def advise(self, names: object) -> None:
        """Does nothing: no file could be read ahead."""


def planned_model(
    plan: Plan, *, companions: Path | None = None, name: str = "model",
    origins: Mapping[str, ByteSource] | None = None,
) -> Model:  # fmt: skip
    """The model that `plan` will write, as a source for another plan. Its bytes can be read only where the `origins` of
    the plan's inputs are given: a tensor is then made in memory each time that it is read. Without them, reading raises
    AttributeError.

    `companions` is the directory whose tokenizer and other small files will be copied, and `name` that of the output.
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
