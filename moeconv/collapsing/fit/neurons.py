"""The neurons of a layer's experts and of its shared expert, and which of them are equal.

Two neurons with the same rows of gate and up have the same activation, in whatever experts they are. Their sum is one
neuron whose column of down is the sum of theirs, each times the weight of its expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeconv.errors import InputError
from moeconv.families.model import Model
from moeconv.families.spec import FFN_PARTS
from moeconv.tensors import all_finite, decode_weight

SHARED = -1  # the number of the shared expert, in place of that of a routed one
_CHUNK = 1 << 24  # elements of rows that are hashed or compared at a time


@dataclass(frozen=True, eq=False)
class Neurons:
    """Neurons [n] of a layer: rows of `gate` (None where the family has none) and `up`, columns of `down`, all [n, H]
    and as they are stored, and the number of the expert of each, `expert` int64 [n]."""

    gate: Tensor | None
    up: Tensor
    down: Tensor
    expert: Tensor

    def __len__(self) -> int:
        return len(self.up)

    def some(self, which: Tensor) -> Neurons:
        """The neurons `which` int64 [m]."""
        gate = None if self.gate is None else self.gate[which]
        return Neurons(gate, self.up[which], self.down[which], self.expert[which])


def read_neurons(model: Model, layer: int) -> Neurons:
    """All neurons of a layer: those of the experts in their order, then those of the shared expert."""
    routed = {part: _routed(model, layer, part) for part in FFN_PARTS if _has(model, "expert", part)}
    width = routed["up"].shape[1]
    expert = torch.arange(model.num_experts).repeat_interleave(width)
    rows = {part: tensor.flatten(0, 1) for part, tensor in routed.items()}
    if _has(model, "shared", "up") and any(r.layer == layer and r.group == "shared" for r in model.roles.values()):
        shared = {part: _rows(_matrix(model, "shared", part, layer), part) for part in routed}
        rows = {part: torch.cat([tensor, shared[part].to(tensor.dtype)]) for part, tensor in rows.items()}
        expert = torch.cat([expert, expert.new_full((len(shared["up"]),), SHARED)])
    if not all(all_finite(tensor) for tensor in rows.values()):
        raise InputError(
            f"layer {layer} has NaN or infinite values in its experts",
            hint="The checkpoint is damaged: download it again.",
        )
    return Neurons(rows.get("gate"), rows["up"], rows["down"], expert)


def equal_to(neurons: Neurons) -> Tensor:
    """int64 [n]: for each neuron the first one with the same bits in its rows of gate and up; itself for most."""
    hashes = torch.stack([_hashes(rows) for rows in (neurons.gate, neurons.up) if rows is not None], 1)
    _, group = torch.unique(hashes, dim=0, return_inverse=True)
    every = torch.arange(len(group))
    first = torch.full((int(group.max()) + 1,), len(group)).scatter_reduce(0, group, every, "amin")[group]
    return torch.where(_same_rows(neurons, first), first, every)


def _hashes(rows: Tensor) -> Tensor:
    """int64 [n]: equal for equal rows."""
    bits = rows.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()])
    draw = torch.Generator().manual_seed(0)
    by = torch.randint(-(1 << 62), 1 << 62, (rows.shape[1],), generator=draw) | 1
    step = max(1, _CHUNK // rows.shape[1])
    return torch.cat([(bits[at : at + step].long() * by).sum(1) for at in range(0, len(bits), step)])


def _same_rows(neurons: Neurons, other: Tensor) -> Tensor:
    same = torch.ones(len(neurons), dtype=torch.bool)
    moved = (other != torch.arange(len(other))).nonzero().flatten()
    step = max(1, _CHUNK // neurons.up.shape[1])
    for at in range(0, len(moved), step):
        some = moved[at : at + step]
        for rows in (neurons.gate, neurons.up):
            if rows is not None:
                same[some] &= (rows[some] == rows[other[some]]).all(1)
    return same


def _has(model: Model, group: str, part: str) -> bool:
    key = f"{group}.{part}"
    return model.family.holds(key) is not None or any(
        part in layout.parts for whole, layout in model.family.tensors.packed.items() if whole.startswith(f"{group}.")
    )


def _rows(matrix: Tensor, part: str) -> Tensor:
    """One row per neuron, of a matrix [..., W, H], or [..., H, W] for down."""
    return matrix.mT if part == "down" else matrix


def _routed(model: Model, layer: int, part: str) -> Tensor:
    """[E, W, H]: the rows of gate or up, or the columns of down, of every expert."""
    packed = [(key, way) for key, way in model.family.tensors.packed.items()
              if key.startswith("expert.") and part in way.parts]  # fmt: skip
    if not packed:
        each = [_rows(_matrix(model, "expert", part, layer, expert), part) for expert in range(model.num_experts)]
        return torch.stack(each)
    key, way = packed[0]
    whole = decode_weight(model, model.family.name(key, layer=layer))
    if way.flat:
        whole = whole.unflatten(0, (model.num_experts, -1))
    whole = whole.mT if way.transposed else whole
    at, count = way.parts.index(part), len(way.parts)
    if count > 1:
        whole = whole[:, at::count] if way.interleaved else whole.chunk(count, 1)[at]
    return _rows(whole, part)


def _matrix(model: Model, group: str, part: str, layer: int, expert: int | None = None) -> Tensor:
    """A matrix with a tensor of its own, or one of several in a tensor."""
    key = f"{group}.{part}"
    whole = model.family.holds(key)
    assert whole is not None
    tensor = decode_weight(model, model.family.name(whole, layer=layer, expert=expert))
    if whole == key:
        return tensor
    parts = model.family.tensors.fused[whole]
    return tensor.chunk(len(parts), 0)[parts.index(key)]
