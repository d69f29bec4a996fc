"""The plan that separates experts that are stacked in one tensor per layer, for families that have both layouts.

It consists of byte ranges alone and is fused with the plan that follows, so that its output is never written. Imports
no torch and reads no tensor bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.families.head import head_warnings, with_head
from moeconv.families.model import Model
from moeconv.families.spec import Family, Role
from moeconv.options import PlanOptions, parameters_of
from moeconv.plan.arrange import arrange
from moeconv.plan.build import carry_all, count_planned, rows
from moeconv.plan.plan import Item, Plan, TensorSpec


def plan_separate(model: Model, *, served: bool = False) -> Plan | None:
    """Plan the same model with one tensor per matrix of an expert. None where the experts are separate already, and
    where the family has no such layout. `served`: the layout may be one that only serving engines read."""
    form = next((form for form in model.family.forms() if not form.tensors.packed), None)
    if form is None and served and not any(way.transposed for way in model.family.tensors.packed.values()):
        form = model.family.served_form
    if not model.packed_experts or form is None or model.quantization:
        return None
    names = {(role.key, role.layer, role.expert): name for name, role in _names(model, form)}

    def apart(ref: TensorRef) -> list[Item] | None:
        role = model.roles[ref.name]
        layout = model.family.tensors.packed.get(role.key)
        if layout is None or role.expert is not None:
            return None
        return [
            _matrix(ref, names[f"expert.{part}", role.layer, e], f"expert.{part}", e, at=i, of=len(layout.parts))
            for e in range(model.num_experts)
            for i, part in enumerate(layout.parts)
        ]

    items = carry_all(model, dtype=None, replace=apart)
    total, active = count_planned(
        items, form, layers=model.num_layers, top_k=model.top_k, num_experts=model.num_experts
    )
    common = PlanOptions()
    return Plan(
        command="separate",
        parameters=parameters_of(common),
        identity=model.identity,
        config=with_head(model),
        shards=arrange(items, common, form),
        params_total=total,
        params_active=active,
        warnings=tuple(head_warnings(model)),
        dropped=model.dropped,
    )


def _names(model: Model, form: Family) -> Iterator[tuple[str, Role]]:
    yield from form.expand(layers=model.num_layers, experts=model.num_experts)
    yield from form.expand_mtp(first=model.num_layers, count=len(model.mtp_layers), experts=model.num_experts)


def _matrix(ref: TensorRef, name: str, key: str, expert: int, *, at: int, of: int) -> Item:
    """Part `at` of the `of` parts of an expert in the stacked tensor `ref` [E, of * rows, columns]."""
    _, height, width = ref.shape
    count = height // of
    flat = TensorRef(ref.name, ref.dtype, (ref.shape[0] * height, width), ref.shard, ref.start, ref.nbytes)
    spec = TensorSpec(name, ref.dtype, (count, width), key, count * width)
    return Item((spec,), "copy", (rows(flat, expert * height + at * count, count),))
