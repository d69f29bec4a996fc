"""The items of a pruned model: kept experts with new numbers, rows of routers and packed tensors, scales, and
overlays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from moeconv.checkpoint.header import FLOAT_DTYPES
from moeconv.checkpoint.overlay import Overlay
from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.errors import InputError, escape
from moeconv.families.model import Model
from moeconv.families.neurons import Narrow
from moeconv.families.packed import SHARED
from moeconv.families.rule import rule_of
from moeconv.families.spec import with_expert
from moeconv.options import PruneOptions
from moeconv.plan.build import carry, carry_all, pick_rows, whole
from moeconv.plan.plan import Item, TensorSpec
from moeconv.prune.criteria import Evidence, sample_of
from moeconv.prune.narrowing import narrowed_items
from moeconv.prune.width import asks_width

Keep = Mapping[int, Sequence[int]]


def with_mtp(model: Model, keep: Keep) -> dict[int, Sequence[int]]:
    """`keep`, extended to the multi-token-prediction layers that it lacks, because they were not measured. They keep
    the experts of the last layer, whose output they read."""
    beside = dict.fromkeys(model.mtp_layers, keep[model.moe_layers[-1]]) if model.mtp_layers else {}
    return beside | dict(keep)


def pruned_items(model: Model, keep: Keep, dtype: str | None, *, narrow: Narrow | None = None) -> list[Item]:
    """The items that write every tensor of the model except those of the removed experts. The kept experts are
    renumbered. With `narrow`, they lose neurons; which ones is in a file that the run gives as the origin `neurons`."""
    keep = with_mtp(model, keep)
    position = {layer: {e: i for i, e in enumerate(kept)} for layer, kept in keep.items()}

    def renewed(ref: TensorRef) -> list[Item] | None:
        role = model.roles[ref.name]
        if role.layer is None:
            return None
        if narrow is not None and (cut := narrow.cut(role)) is not None:
            return narrowed_items(ref, role, cut, keep[role.layer] if role.group == "expert" else (0,), dtype=dtype)
        if role.group not in ("expert", "router"):
            return None
        axis = model.family.expert_axis(role)
        if role.part in SHARED and role.expert is None:
            return None
        if axis is not None:
            return [_cut(model, ref, role.key, keep[role.layer], axis=axis, dtype=dtype, changed=role.group)]
        if role.expert is None or (new := position[role.layer].get(role.expert)) is None:
            return None if role.expert is None else []
        name = with_expert(ref.name, role.expert, new)
        return [carry(ref, role=role.key, name=name, dtype=dtype, params=model.numel(ref), changed="expert")]

    return carry_all(model, dtype=dtype, replace=renewed)


def _cut(
    model: Model, ref: TensorRef, key: str, kept: Sequence[int], *, axis: int, dtype: str | None, changed: str
) -> Item:
    """The entries of the kept experts along `axis`: their byte ranges are joined, or cast if another dtype is asked
    for."""
    layout = model.family.tensors.packed.get(key)
    each = ref.shape[axis] // model.num_experts if layout and layout.flat else 1  # rows of one expert
    if any(size != 1 for size in ref.shape[:axis]) or ref.shape[axis] != model.num_experts * each:
        raise InputError(
            f"tensor {escape(ref.name)!r} has shape {list(ref.shape)}, not an entry for each of {model.num_experts} "
            "experts",
            hint="config.json and the shards do not belong together.",
        )
    flat = replace(ref, shape=(model.num_experts, each, *ref.shape[axis + 1 :]))  # the dimensions before it are 1
    shape = (*ref.shape[:axis], len(kept) * each, *ref.shape[axis + 1 :])
    casts = dtype is not None and ref.dtype in FLOAT_DTYPES and key not in model.family.tensors.float32
    out = dtype if casts and dtype else ref.dtype
    params = model.numel(ref) // model.num_experts * len(kept)
    kernel = "copy" if out == ref.dtype else "cast"
    return Item((TensorSpec(ref.name, out, shape, key, params),), kernel, pick_rows(flat, kept), {}, changed)


def scales_of(model: Model, keep: Keep, evidence: Evidence, options: PruneOptions) -> dict[int, float]:
    """{layer: the factor on the outputs of its kept experts}, for routers that do not renormalise. Their weights for
    the kept experts grow by the share of the removed ones. The factor is the least-squares scale on the token
    sample."""
    wanted = not model.renormalises if options.rescale is None else options.rescale
    repaired = options.refit or options.heal or options.merge or asks_width(options)
    if not wanted or repaired or evidence.statistics is None or model.quantization:
        return {}
    evidence = replace(evidence, rule=rule_of(model))
    try:
        return {layer: sample_of(evidence, layer).scale(kept) for layer, kept in keep.items()}
    except (InputError, KeyError):
        return {}  # statistics without a token sample; a warning reports this


def scaled(model: Model, items: list[Item], scales: Mapping[int, float]) -> list[Item]:
    """The items, with the down projections of the layers in `scales` multiplied by the factor of their layer."""
    made = []
    for item in items:
        spec = item.outputs[0]
        role = model.roles.get(spec.name)
        down = role is not None and role.key in ("expert.down", "expert.down_bias")
        if role is None or not down or role.layer is None or role.layer not in scales:
            made.append(item)
            continue
        inputs = [["input", {"index": i}, []] for i in range(len(item.inputs))]
        tree = ["scale", {"by": scales[role.layer]}, [["concat", {}, inputs] if len(inputs) > 1 else inputs[0]]]
        made.append(Item(item.outputs, "compute", item.inputs, {"tree": tree}, item.changed))
    return made


def replaced(items: list[Item], overlays: Mapping[str, Overlay]) -> list[Item]:
    """The items, with the tensors that an overlay contains read from it. If several overlays contain a tensor, the last
    one is used."""
    made = []
    unused = {(origin, name) for origin, file in overlays.items() for name in file.tensors}
    for item in items:
        for origin, file in overlays.items():
            info = file.tensors.get(item.outputs[0].name) if len(item.outputs) == 1 else None
            if info is None:
                continue
            (spec,) = item.outputs
            if info.shape != spec.shape or info.dtype not in FLOAT_DTYPES:
                raise InputError(
                    f"{file.label}: {escape(spec.name)} has shape {list(info.shape)}; expected {list(spec.shape)}",
                    hint="The overlay was made for another plan. Make it again for this one.",
                )
            ref = TensorRef(info.name, info.dtype, info.shape, "", info.start, info.nbytes)
            item = Item((spec,), "copy" if info.dtype == spec.dtype else "cast", (whole(ref, origin=origin),), {},
                        item.changed)  # fmt: skip
            unused.discard((origin, spec.name))
        made.append(item)
    if unused:
        origin, name = min(unused)
        raise InputError(
            f"the overlay {origin} contains the tensor {escape(name)}, which the pruned model does not have",
            hint="The overlay was made for another plan. Make it again for this one.",
        )
    return made
