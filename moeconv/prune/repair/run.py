"""Writes the refitted, rescaled or merged experts of a pruned model to an overlay, layer by layer.

The tensors of the overlay have the names and shapes of the pruned checkpoint; `plan_prune(..., overlays=...)` applies
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from moeconv.checkpoint.artifact import artifact_metadata
from moeconv.checkpoint.overlay import Layout, writing_overlay
from moeconv.data.windows import TokenData
from moeconv.errors import InputError
from moeconv.families.model import Model
from moeconv.families.neurons import Narrow
from moeconv.plan.kernels.stored import TORCH_DTYPES, to_bytes
from moeconv.plan.meter import Meter, SilentMeter
from moeconv.prune.repair.narrow import columns_of
from moeconv.prune.repair.progress import PassProgress
from moeconv.prune.repair.pruned import pruned_pass
from moeconv.prune.repair.variant import Variant
from moeconv.stream.layers import LayerStream
from moeconv.types import Config
from moeconv.world import current, first

OVERLAY_VERSION = 1


def repair(
    stream: LayerStream,
    read: TokenData,
    variant: Variant,
    path: Path,
    *,
    left: int,
    parts: Sequence[str] = ("down",),
    settings: Config | None = None,
    narrow: Narrow | None = None,
    meter: Meter | None = None,
    save_every: float | None = None,
) -> None:
    """Run `variant` beside the model, and write its changed experts to the overlay `path`. With `save_every` seconds,
    an interrupted run resumes at a layer boundary.

    `parts` are the matrices that change; `left` is the number of experts per layer of the pruned model, and `narrow`
    its width if the experts lose neurons. Raises
    InputError for a family whose experts cannot be written in this way.
    """
    changed = variant.refit is not None or variant.width is not None or narrow is None
    names = overlay_names(stream.model, left, parts, narrow=narrow) if changed else {}
    about = artifact_metadata(
        "overlay", version=OVERLAY_VERSION, identity=stream.model.identity, experts=left,
        sources=[source.to_json() for source in read.sources], **dict(settings or {}),
    )  # fmt: skip
    tensors = [(layer, layout) for (layer, _, _), layout in names.items()]
    with pass_into(
        path, tensors, about, stream, read, variant, narrow=narrow, meter=meter, save_every=save_every
    ) as put:

        def write(layer: int, experts: Sequence[int], downs: Tensor) -> None:
            if (neurons := variant.neurons.get(layer)) is not None:
                downs = columns_of(downs, neurons)
            made = dict(zip(experts, downs))
            for name, tensor in on_disk(stream.model, layer, list(variant.keep.get(layer, experts)), made, parts=parts):
                put(name, tensor)

        variant.on_layer = write


@contextmanager
def pass_into(
    path: Path, tensors: Sequence[tuple[int, Layout]], about: Mapping[str, str], stream: LayerStream, read: TokenData,
    variant: Variant, *, narrow: Narrow | None = None, meter: Meter | None = None, save_every: float | None = None,
) -> Iterator[Callable[[str, Tensor], None]]:  # fmt: skip
    """Run `variant` when the block ends, and write the overlay `path`: `tensors`, and the down projections of shared
    experts that lose neurons. The block gets a function that writes a tensor by name, for the callbacks of the variant.
    Of several processes, the first one writes."""
    meter = meter or SilentMeter()
    if not current().leads:
        yield lambda _name, _tensor: None
        pruned_pass(stream, [variant], progress=PassProgress(path, stream, read, meter=meter, every=save_every))
        first(lambda: None)  # the overlay is there when the first process passes this
        return
    shared = {} if narrow is None else shared_layouts(narrow)
    tensors = [*tensors, *shared.items()]
    with writing_overlay(path, tensors, metadata=about, overwrite=True, resumes=save_every is not None) as writer:

        def put(name: str, tensor: Tensor) -> None:
            writer.write(name, to_bytes(tensor))

        def put_shared(layer: int, _experts: Sequence[int], down: Tensor) -> None:
            name, dtype, shape = shared[layer]
            some = columns_of(down, variant.shared_neurons[layer])[0]
            put(name, (some if some.shape == shape else some.mT).contiguous().to(TORCH_DTYPES[dtype]))

        variant.on_shared = put_shared
        yield put
        progress = PassProgress(path, stream, read, meter=meter, every=save_every, written=writer)
        pruned_pass(stream, [variant], progress=progress)
    first(lambda: None)


def shared_layouts(narrow: Narrow) -> dict[int, Layout]:
    """{layer: (name, dtype, shape) of the down projection of the shared expert}, where it loses neurons."""
    downs = {layer: narrow.shared_down(layer) for layer in narrow.model.moe_layers}
    tensors = narrow.model.checkpoint.tensors
    return {
        layer: (down[0], tensors[down[0]].dtype, down[1].shape) for layer, down in downs.items() if down is not None
    }


def overlay_names(
    model: Model, left: int, parts: Sequence[str], *, narrow: Narrow | None = None
) -> dict[tuple[int, int, str], Layout]:
    """{(layer, new expert, part): (name, dtype, shape)} in the order of writing. The expert is 0 if one tensor holds
    all experts."""
    tensors, family = model.checkpoint.tensors, model.family
    named: dict[tuple[int, int, str], Layout] = {}
    if family.kind != "moe":
        assert narrow is not None and tuple(parts) == ("down",)
        for layer in model.with_ffn(range(model.num_layers), every=True):
            ref = tensors[model.ffn_name("down", layer=layer)]
            cut = narrow.cut(model.roles[ref.name])
            assert cut is not None
            named[layer, 0, "down"] = (ref.name, ref.dtype, cut.shape)
        return named
    for layer in model.moe_layers:
        for expert in range(1 if model.packed_experts else left):
            for part in parts:
                key = f"expert.{part}"
                if key not in family.tensors.names or (model.packed_experts and part != "down"):
                    packed = f"{family.model_type} stores {part} and another matrix of all experts in one tensor"
                    alone = f"the experts of {family.model_type} have no {part} matrix"
                    raise InputError(packed if model.packed_experts else alone, hint="Leave out --merge.")
                name = family.name(key, layer=layer, expert=expert)
                ref = tensors[family.name(key, layer=layer, expert=0)]
                role = model.roles[ref.name]
                cut = None if narrow is None else narrow.cut(role)
                whole = ref.shape if cut is None else cut.shape
                shape = (whole[0] // model.num_experts * left, *whole[1:]) if model.packed_experts else whole
                named[layer, expert, part] = (name, ref.dtype, shape)
    return named


def on_disk(
    model: Model,
    layer: int,
    kept: Sequence[int],
    made: Mapping[int, Tensor | Mapping[str, Tensor]],
    *,
    parts: Sequence[str],
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the experts of a layer, in the order of `overlay_names`. `made` is {old expert: down projection
    [H, I]}, or {old expert: {part: matrix}} if several parts change. The FFN of a dense model is the expert 0."""
    family = model.family
    if family.kind != "moe":
        ref = model.checkpoint.tensors[model.ffn_name("down", layer=layer)]
        (down,) = made.values()
        assert isinstance(down, Tensor)
        turned = ref.shape[0] != down.shape[0]
        yield ref.name, (down.mT if turned else down).contiguous().to(TORCH_DTYPES[ref.dtype])
        return
    matrices = {e: value if isinstance(value, Mapping) else {"down": value} for e, value in made.items()}
    if model.packed_experts:
        ref = model.checkpoint.tensors[family.name("expert.down", layer=layer)]
        whole = torch.stack([matrices[e]["down"] for e in kept])
        if family.tensors.packed["expert.down"].transposed:
            whole = whole.transpose(1, 2)
        if family.tensors.packed["expert.down"].flat:
            whole = whole.flatten(0, 1)
        yield ref.name, whole.contiguous().to(TORCH_DTYPES[ref.dtype])
        return
    for new, old in enumerate(kept):
        for part in parts:
            ref = model.checkpoint.tensors[model.expert_name(part, layer=layer, expert=old)]
            name = family.name(f"expert.{part}", layer=layer, expert=new)
            yield name, matrices[old][part].contiguous().to(TORCH_DTYPES[ref.dtype])
