"""The factors that AWQ moved into weights, as their overlay has them. Imports torch, and only when called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moeconv.checkpoint.overlay import Overlay
from moeconv.families.model import Model
from moeconv.families.packed import weight_of
from moeconv.quantize.gptq.need import FOLD, FOLDED, READERS

Weight = Any  # a torch Tensor; this module must not import torch when it is imported


def factors_of(overlay: Overlay, written: Model) -> Callable[[str, Weight], Weight]:
    """A function from (a tensor of a packed weight, the weight [out, in] of the source) to the weight that was packed:
    the source's, times the factors of its columns and rows. The names are those of the `written` model."""
    place: dict[tuple[int | None, int | None], str] = {}
    roles = {weight_of(name): role for name, role in written.roles.items()}
    for name in overlay.tensors:
        role = roles.get(name.removesuffix(FOLD))
        if name.endswith(FOLD) and role is not None:
            place[role.layer, role.expert] = name

    def factors(layer: int | None, expert: int | None) -> Weight:
        import torch

        from moeconv.plan.kernels.stored import to_tensor

        ref = overlay.tensors[place[layer, expert]]
        return torch.exp2(to_tensor(overlay.read(ref.name), ref.dtype, ref.shape).float())

    def packed(name: str, weight: Weight) -> Weight:
        role = written.roles[name]
        if role.layer is None or ((role.layer, None) not in place and (role.layer, role.expert) not in place):
            return weight
        inner = (role.layer, role.expert)
        if role.key == FOLDED[1]:
            return weight * factors(*inner) if inner in place else weight
        if role.key == "expert.up" and inner in place:
            weight = weight / factors(*inner)[:, None]
        reads = role.key in READERS or role.group == "expert"
        return weight * factors(role.layer, None) if reads and (role.layer, None) in place else weight

    return packed
