"""Which tensors of a GGUF file a tensor of the source becomes, and the item of the plan that makes each of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from moeconv.checkpoint.header import BLOCK_DTYPES
from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.families.model import Model
from moeconv.families.records import Packed
from moeconv.families.spec import Role
from moeconv.plan.build import whole
from moeconv.plan.plan import Input, Item, TensorSpec
from moeconv.quantize.gguf.llama_cpp.expression import Expression
from moeconv.quantize.gguf.llama_cpp.names import NAMES
from moeconv.quantize.gguf.llama_cpp.record import LlamaCpp


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of the file, or one expert's share of it, before its dtype is chosen."""

    target: str
    # number of the expert; None for a tensor that is not of the routed experts
    expert: int | None
    source: Input
    part: Expression
    # key of the matrix, such as "expert.gate"
    key: str

    def item(self, dtype: str, changed: str, **params: object) -> Item:
        """The item that makes it. `params` are those of the kernel `gguf`, which encodes block dtypes."""
        name = self.target if self.expert is None else f"{self.target}#{self.expert}"
        part, source = self.part, self.source
        spec = TensorSpec(name, dtype, part.shape, self.key, math.prod(part.shape))
        if part.tree is None:
            ref = source._replace(shape=part.shape)
            kernel = "copy" if dtype == ref.dtype else "gguf"
            return Item((spec,), kernel, (ref,), {} if kernel == "copy" else params, changed)
        if dtype not in BLOCK_DTYPES:
            return Item((spec,), "compute", (source,), {"tree": part.tree}, changed)
        between = "F32" if part.computed else source.dtype
        chained = {
            "first": {"kernel": "compute", "params": {"tree": part.tree}},
            "between": [name, between, list(part.shape), 0, list(part.shape)],
            "then": {"kernel": "gguf", "params": params},
        }
        return Item((spec,), "chain", (source,), chained, changed)


def template(row: LlamaCpp, key: str) -> str | None:
    """The name of the tensor for a key, with {L} for the layer: "" where it is left out, None where there is none."""
    return row.names.get(key, NAMES.get(key))


def written(model: Model, row: LlamaCpp, ref: TensorRef, role: Role) -> Iterator[GgufTensor]:
    """What one tensor of the source becomes in the file."""
    layout = model.family.tensors.packed.get(role.key) if role.expert is None else None
    if layout is None:
        yield from _changed(model, row, whole(ref), Expression(ref.shape), role, role.key, role.expert)
        return
    count = model.num_experts
    size, shape = ref.nbytes // count, _one_expert(ref, layout, count)
    if len(layout.parts) > 1 and template(row, role.key) is not None:  # all parts of an expert stay one matrix
        for expert in range(count):
            source = Input(ref.name, ref.dtype, shape, expert * size, size)
            yield from _changed(model, row, source, Expression(shape), role, role.key, expert)
        return
    for at, part in enumerate(layout.parts):
        for expert in range(count):
            source = Input(ref.name, ref.dtype, shape, expert * size, size)
            yield from _changed(model, row, source, _unpacked(shape, layout, at), role, f"expert.{part}", expert)


def _one_expert(ref: TensorRef, layout: Packed, count: int) -> tuple[int, ...]:
    return (ref.shape[0] // count, *ref.shape[1:]) if layout.flat else ref.shape[1:]


def _unpacked(shape: tuple[int, ...], layout: Packed, at: int) -> Expression:
    """Expression `at` of the matrices that a tensor has of one expert, as [out, in]."""
    part, count = Expression(shape), len(layout.parts)
    if layout.transposed:
        part = part.permute(1, 0)
    if count == 1:
        return part
    rows, rest = part.shape[0] // count, part.shape[1:]
    if layout.interleaved:
        return part.reshape(rows, count, *rest).cut(1, at, at + 1).reshape(rows, *rest)
    return part.cut(0, at * rows, (at + 1) * rows)


def _changed(
    model: Model, row: LlamaCpp, source: Input, part: Expression, role: Role, key: str, expert: int | None
) -> Iterator[GgufTensor]:
    usual = template(row, key)
    made: Mapping[str, Expression] = {"": part}
    if (change := row.changes.get(key)) is not None:
        made = change(model.value, part)
    for name, piece in made.items():
        if name or usual:
            target = (name or usual or "").replace("{L}", str(role.layer))
            yield GgufTensor(target, expert, source, piece, key)
