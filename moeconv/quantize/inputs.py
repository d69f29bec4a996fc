"""The scales of inputs in a plan: one number beside each weight of a scheme that quantizes its inputs by a measured
scale."""

from __future__ import annotations

from collections.abc import Iterable

from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.families.spec import Role
from moeconv.plan.plan import Input, Item, TensorSpec

ORIGIN = "inputs"  # the origin of the scales in a plan: execute(..., origins={ORIGIN: overlay})
_SUFFIX = ".input_global_scale"


def scale_item(ref: TensorRef, role: Role) -> Item:
    """The item that copies the scale of a weight's inputs from what was measured."""
    spec = TensorSpec(ref.name.removesuffix(".weight") + _SUFFIX, "F32", (1,), role.key, 0)
    return Item((spec,), "copy", (Input(spec.name, spec.dtype, spec.shape, 0, spec.nbytes, ORIGIN),), {}, role.group)


def scale_items(items: Iterable[Item]) -> list[Item]:
    """The items of a plan that copy scales of inputs."""
    return [item for item in items if any(ref.origin == ORIGIN for ref in item.inputs)]
