"""A Plan seen as the checkpoint that it will write, so that the next step can be planned before it exists."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from moeconv.checkpoint.reader import Checkpoint, TensorRef
from moeconv.families.model import Model, open_model
from moeconv.plan.plan import Plan


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

    def same_bytes(self, first: str, second: str) -> bool:
        """Asked of a tied head that is stored: the plan has untied what differs (families/head.py)."""
        return True

    def identity(self, whole: object = ()) -> str:
        return self.plan_id


def planned_model(plan: Plan, *, companions: Path | None = None, name: str = "model") -> Model:
    """The model that `plan` will write, for planning on; reading its bytes is an AttributeError.

    `companions` is the directory whose tokenizer and other small files will come along, `name` the output's.
    """
    tensors = {
        spec.name: TensorRef(spec.name, spec.dtype, spec.shape, shard.name, 0, spec.nbytes)
        for shard in plan.shards
        for spec in shard.layout()
    }
    shards = tuple(shard.name for shard in plan.shards)
    path = companions or Path("(planned)")
    planned = _PlannedCheckpoint(path, name, dict(plan.config), tensors, shards, plan.plan_id)
    return open_model(cast(Checkpoint, planned))
