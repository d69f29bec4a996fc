"""The plan that writes the same model with its experts in another layout: one tensor per matrix, or stacked otherwise.

It moves bytes, transposes and deals rows, expert by expert, and is fused with the plan that follows, so that its output
is never written. Imports no torch and reads no tensor bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from moeconv.checkpoint.header import tensor_nbytes
from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.families.head import head_warnings, with_head
from moeconv.families.model import Model
from moeconv.families.records import Packed
from moeconv.families.spec import Family, Role
from moeconv.options import PlanOptions, parameters_of
from moeconv.plan.arrange import arrange
from moeconv.plan.build import carry_all, count_planned, whole
from moeconv.plan.plan import Input, Item, Plan, TensorSpec
from moeconv.units import counted

Tree = list[Any]  # an expression of the kernel "compute"


def separate_form(family: Family) -> Family | None:
    """The row with one tensor per matrix of an expert, as a class of transformers reads it."""
    return next((form for form in family.forms() if not form.tensors.packed), None)


def served_form(family: Family) -> Family | None:
    """The row with one tensor per matrix of an expert, as transformers or else serving engines read it."""
    return separate_form(family) or family.served_form


def plan_layout(model: Model, form: Family | None, *, prediction: bool = True) -> Plan | None:
    """Plan the same model with the experts in the layout of `form`, another layout of its family. None where they have
    it already, and where there is no such layout. Without `prediction`, multi-token-prediction layers are left out."""
    if form is None or model.quantization or form.tensors.names == model.family.tensors.names:
        return None
    layout = _Layout(model, form)
    left_out = () if prediction else tuple(n for n, r in model.roles.items() if r.layer in model.prediction_layers)
    gone = set(left_out)
    items = carry_all(model, dtype=None, replace=lambda ref: [] if ref.name in gone else layout.items(ref))
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
        warnings=(*head_warnings(model), *_left(model, left_out, form)),
        dropped=(*model.dropped, *left_out),
    )


def _left(model: Model, names: Sequence[str], form: Family) -> list[str]:
    """The warning about multi-token-prediction layers that are left out."""
    layers = f"the multi-token-prediction layers {list(model.prediction_layers)} ({counted(len(names), 'tensor')})"
    return [f"{layers} are left out, since {form.tensors.readers} does not run them"] if names else []


@dataclass(frozen=True)
class _Held:
    """Where the source has one matrix or bias of an expert: in the whole tensor, or in the entry `expert` of a stacked
    tensor as number `at` of its parts."""

    ref: TensorRef
    way: Packed | None = None
    expert: int = 0
    at: int = 0
    experts: int = 1

    def take(self, index: int) -> tuple[Input, Tree, tuple[int, ...]]:
        """(the input that has it, the expression that takes it from input `index`, its shape)."""
        if self.way is None:
            return whole(self.ref), ["input", {"index": index}, []], self.ref.shape
        way, count = self.way, len(self.way.parts)
        one = (self.ref.shape[0] // self.experts, *self.ref.shape[1:]) if way.flat else self.ref.shape[1:]
        size = tensor_nbytes(self.ref.dtype, one)
        turned = way.transposed and len(one) == 2
        rows = (one[1] if turned else one[0]) // count
        shape = (rows, one[0]) if turned else (rows, *one[1:])
        if not turned and not way.interleaved:
            part = size // count
            start = self.expert * size + self.at * part
            return Input(self.ref.name, self.ref.dtype, shape, start, part), ["input", {"index": index}, []], shape
        tree: Tree = ["input", {"index": index}, []]
        if turned:
            tree = ["transpose", {}, [tree]]
        if way.interleaved and count > 1:
            tree = ["every", {"first": self.at, "step": count}, [tree]]
        elif count > 1:
            tree = ["cut", {"axis": 0, "start": self.at * rows, "stop": (self.at + 1) * rows}, [tree]]
        return Input(self.ref.name, self.ref.dtype, one, self.expert * size, size), tree, shape


class _Layout:
    """The items that write the experts of a model in the layout of `form`."""

    def __init__(self, model: Model, form: Family) -> None:
        self.model, self.form = model, form
        self.held = dict(_held(model))
        self.names: dict[str, Role] = {n: r for n, r in _names(model, form) if r.group == "expert"}
        self.of: dict[str, list[str]] = {}  # source tensor -> the tensors that begin with a part of it
        self._assign()

    def _assign(self) -> None:
        for name, role in self.names.items():
            first = self._parts(role)[0]
            held = self.held.get((first, role.layer, role.expert or 0))
            if held is not None:
                self.of.setdefault(held.ref.name, []).append(name)

    def _parts(self, role: Role) -> tuple[str, ...]:
        """What the tensor of a role holds of an expert."""
        way = self.form.tensors.packed.get(role.key)
        return way.parts if way is not None and role.expert is None else (role.key.removeprefix("expert."),)

    def items(self, ref: TensorRef) -> list[Item] | None:
        """The items in the place of a source tensor; None for one that is not of an expert."""
        if self.model.roles[ref.name].group != "expert":
            return None
        made = [(name, self.names[name]) for name in self.of.get(ref.name, ())]
        made.sort(key=lambda pair: pair[1].expert or 0)  # the matrices of an expert side by side
        return [item for name, role in made for item in self._write(name, role)]

    def _write(self, name: str, role: Role) -> Iterator[Item]:
        way = self.form.tensors.packed.get(role.key) if role.expert is None else None
        if way is None:
            assert role.expert is not None
            yield self._one(name, role, role.expert, None)
            return
        for expert in range(self.model.num_experts):
            yield self._one(name, role, expert, way)

    def _one(self, name: str, role: Role, expert: int, way: Packed | None) -> Item:
        """The item that writes what the tensor has of one expert: a slice of it, if it is stacked."""
        taken = [self.held[part, role.layer, expert].take(i) for i, part in enumerate(self._parts(role))]
        inputs, trees, shapes = zip(*taken, strict=True)
        tree = trees[0]
        if len(trees) > 1:
            tree = ["interleave" if way and way.interleaved else "concat", {}, list(trees)]
        shape = (sum(s[0] for s in shapes), *shapes[0][1:])
        if way is not None and way.transposed and len(shape) == 2:
            tree, shape = ["transpose", {}, [tree]], shape[::-1]
        at, of = (0, 0) if way is None else (expert, self.model.num_experts)
        spec = TensorSpec(name, inputs[0].dtype, shape, role.key, prod(shape), at, of)
        plain = tree[0] == "input" or (tree[0] == "concat" and all(part[0] == "input" for part in tree[2]))
        return Item((spec,), "copy", inputs) if plain else Item((spec,), "compute", inputs, {"tree": tree})


def _held(model: Model) -> Iterator[tuple[tuple[str, int | None, int], _Held]]:
    """(part, layer, expert) of every matrix and bias of the experts, and where it is."""
    for name, role in model.roles.items():
        if role.group != "expert":
            continue
        ref = model.checkpoint.tensors[name]
        way = model.family.tensors.packed.get(role.key) if role.expert is None else None
        if way is None:
            yield (role.key.removeprefix("expert."), role.layer, role.expert or 0), _Held(ref)
            continue
        for expert in range(model.num_experts):
            for at, part in enumerate(way.parts):
                yield (part, role.layer, expert), _Held(ref, way, expert, at, model.num_experts)


def _names(model: Model, form: Family) -> Iterator[tuple[str, Role]]:
    yield from form.expand(layers=model.num_layers, experts=model.num_experts)
    yield from form.expand_mtp(first=model.num_layers, count=len(model.mtp_layers), experts=model.num_experts)
