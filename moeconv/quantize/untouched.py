"""Weights that are already stored in the form in which a plan packs them: their bytes are copied, not rounded again.

Codes of a block are not unique: those that decode to the same numbers may differ from what packing would choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moeconv.families.packed import split_part
from moeconv.plan.plan import Input, Item, Plan, TensorSpec
from moeconv.quantize.formats import kernel_of

_INPUTS = "input_scale"  # a part on which the weight does not depend


def untouched(plan: Plan) -> Plan:
    """The plan with the items marked that decode a weight and pack all of it in the form that it was stored in."""
    shards = tuple(replace(shard, items=tuple(map(_marked, shard.items))) for shard in plan.shards)
    return replace(plan, shards=shards)


def _marked(item: Item) -> Item:
    if item.kernel not in ("chain", "gather"):
        return item
    of_first = item.params.get("firsts", (item.params,))[0]
    first, then = of_first["first"], item.params["then"]
    kernel = kernel_of(then["kernel"])
    if first["kernel"] != "decode" or kernel is None:
        return item
    stored = kernel.encodes.get(first["params"]["how"]["form"])
    read = dict(zip(first["params"]["parts"], item.inputs))  # the inputs of other weights follow
    if stored is None or {*read} - {_INPUTS} != {*stored.parts}:
        return item
    refs = tuple(read[part] for part in stored.parts)
    if not all(map(_alike, refs, item.outputs)) or not (stored.kernel or _named_alike(refs, item.outputs)):
        return item
    shared = dict(zip(first["params"]["parts"], first["params"]["shared"]))
    decoded = {**first["params"], "parts": [*stored.parts], "shared": [shared[part] for part in stored.parts]}
    params = {
        "first": first | {"params": decoded}, "between": of_first["between"], "then": then,
        "untouched": stored.kernel or True,
    }  # fmt: skip
    return replace(item, kernel="chain", inputs=refs, params=params)


def _alike(ref: Input, spec: TensorSpec) -> bool:
    """Whether an input can be an output: of equal dtype and shape, but for axes of one."""
    shapes = [[size for size in shape if size != 1] for shape in (ref.shape, spec.shape)]
    return (ref.dtype, ref.nbytes) == (spec.dtype, spec.nbytes) and shapes[0] == shapes[1]


def _named_alike(refs: Sequence[Input], outputs: Sequence[TensorSpec]) -> bool:
    """Whether the inputs are the parts of a weight that the outputs are."""
    return [_part(ref.tensor) for ref in refs] == [_part(spec.name) for spec in outputs]


def _part(name: str) -> str:
    split = split_part(name)
    return split[1] if split else ""
