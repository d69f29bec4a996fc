"""The items of tensors that lose neurons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from moeconv.checkpoint.header import FLOAT_DTYPES, tensor_nbytes
from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.families.neurons import NeuronCut
from moeconv.families.spec import Role, with_expert
from moeconv.plan.build import pick_rows, whole
from moeconv.plan.plan import Input, Item, TensorSpec
from moeconv.prune.width import ORIGIN, neurons_name


def narrowed_items(ref: TensorRef, role: Role, cut: NeuronCut, kept: Sequence[int], *, dtype: str | None) -> list[Item]:
    """The items of a tensor of which neurons are removed: one, or none for an expert that is not `kept`.

    A shared expert whose width is a multiple of the experts' width may need more neurons; these are zeros, which add
    nothing."""
    if role.expert is not None and role.expert not in kept:
        return []
    stacked = role.group == "expert" and role.expert is None
    inputs: tuple[Input, ...] = (whole(ref),)
    shape = cut.shape
    if stacked:
        of_all = math.prod(ref.shape) // (cut.before * cut.size * cut.after)
        inputs = pick_rows(replace(ref, shape=(of_all, math.prod(ref.shape) // of_all)), kept)
        shape = (shape[0] // of_all * len(kept), *shape[1:])
    params = {"before": cut.before, "size": cut.size, "after": cut.after}
    if cut.new > cut.size:
        params["new"] = cut.new
    else:
        assert role.layer is not None
        rows, first = (len(kept), 0) if stacked else (1, kept.index(role.expert) if role.expert is not None else 0)
        each = tensor_nbytes("I32", (cut.new,))
        name = neurons_name(role.layer, role.group)
        index = Input(name, "I32", (rows, cut.new), first * each, rows * each, ORIGIN)
        inputs = (index, *inputs)
    name = ref.name if role.expert is None else with_expert(ref.name, role.expert, kept.index(role.expert))
    out = dtype if dtype and ref.dtype in FLOAT_DTYPES else ref.dtype
    spec = TensorSpec(name, out, shape, role.key, math.prod(shape))
    return [Item((spec,), "pick_neurons", inputs, params, role.group)]
