"""Writes healed layers to an overlay: every tensor of the kept experts, and the router, as in the pruned checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from moeconv.checkpoint.artifact import artifact_metadata
from moeconv.checkpoint.overlay import Layout
from moeconv.data.windows import TokenData
from moeconv.errors import InputError, escape
from moeconv.families.model import Model
from moeconv.families.neurons import Narrow
from moeconv.plan.kernels.stored import TORCH_DTYPES
from moeconv.plan.meter import Meter
from moeconv.prune.repair.heal import Healed, trained
from moeconv.prune.repair.run import pass_into
from moeconv.prune.repair.variant import Variant
from moeconv.stream.layer import Layer
from moeconv.stream.layers import LayerStream
from moeconv.types import Config

OVERLAY_VERSION = 1


def write_healed(
    stream: LayerStream, read: TokenData, variant: Variant, path: Path, *, left: int, settings: Config,
    narrow: Narrow | None = None, meter: Meter | None = None, save_every: float | None = None,
) -> None:  # fmt: skip
    """Run `variant` beside the model, heal every layer, and write the overlay `path`. `left` is the number of experts
    per layer of the pruned model, and `narrow` its width if the experts lose neurons. With `save_every` seconds, an
    interrupted run resumes at a layer boundary."""
    model = stream.model
    about = artifact_metadata(
        "overlay", version=OVERLAY_VERSION, identity=model.identity, experts=left,
        sources=[source.to_json() for source in read.sources], **settings,
    )  # fmt: skip
    layouts = {layer: healed_layout(model, layer, left, narrow=narrow) for layer in model.moe_layers}
    tensors = [(layer, layout) for layer, of_layer in layouts.items() for layout in of_layer]
    with pass_into(
        path, tensors, about, stream, read, variant, narrow=narrow, meter=meter, save_every=save_every
    ) as put:

        def write(layer: Layer, healed: Healed) -> None:
            kept = sorted(variant.keep[layer.index])
            neurons = variant.neurons.get(layer.index)
            for name, tensor in on_disk(
                stream, layer, healed, kept, layouts[layer.index], narrow=narrow, neurons=neurons
            ):
                put(name, tensor)

        variant.on_healed = write


def healed_layout(model: Model, layer: int, left: int, *, narrow: Narrow | None = None) -> list[Layout]:
    """(name, dtype, shape) of the tensors that are written for a layer, of which `left` experts are kept."""
    found: list[Layout] = []
    for name, role in trained(model, layer):
        ref, axis = model.checkpoint.tensors[name], model.family.expert_axis(role)
        cut = None if narrow is None else narrow.cut(role)
        shape = ref.shape if cut is None else cut.shape
        if role.expert is None and axis is not None:
            size = shape[axis] // model.num_experts * left
            found.append((name, ref.dtype, (*shape[:axis], size, *shape[axis + 1 :])))
        elif role.expert is not None and role.expert < left:
            found.append((name, ref.dtype, shape))
    return found


def on_disk(
    stream: LayerStream, layer: Layer, healed: Healed, kept: Sequence[int], layout: Sequence[Layout], *,
    narrow: Narrow | None = None, neurons: Tensor | None = None,
) -> list[tuple[str, Tensor]]:  # fmt: skip
    """(name, tensor) of a healed layer as in the pruned checkpoint, in the order of `layout`. With `narrow`, its kept
    experts have the `neurons` int64 [n, W] only.

    Raises InputError where transformers does not save the experts as this checkpoint stores them.
    """
    assert layer.experts is not None
    made = stream.skeleton.saved(layer.experts, healed.experts)
    made[stream.model.router_name(layer.index)] = healed.router[list(kept)]
    if narrow is not None and neurons is not None:
        for name in made.keys() & stream.model.roles.keys():
            if (cut := narrow.cut(role := stream.model.roles[name])) is not None:
                of = neurons if role.expert is None else neurons[role.expert][None]
                whole = made[name].reshape(len(of), cut.before, cut.size, cut.after)
                made[name] = whole.gather(2, of[:, None, :, None].expand(-1, cut.before, -1, cut.after))
    for name, _, shape in layout:
        if name not in made or made[name].numel() != torch.Size(shape).numel():
            raise InputError(
                f"--heal cannot write {escape(name)!r}: transformers saves the experts of "
                f"{stream.model.family.model_type} in another layout",
                hint="Leave out --heal. --refit takes this model.",
            )
    return [(name, made[name].reshape(shape).to(TORCH_DTYPES[dtype])) for name, dtype, shape in layout]
