"""Two plans as one: the second planned on what the first writes, run in one pass from the first's source.

Same tensors, config and companions as the two after one another; what lies between is never written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moeconv.plan.plan import Input, Item, Plan, Shard


def fuse(first: Plan, second: Plan) -> Plan | None:
    """`second`, with its inputs traced back through `first` to that one's source; None where they cannot be.

    `second` must have been planned on `planned_model(first)`. A role that both change is counted as the second does.
    """
    if any(ref.origin != "source" for plan in (first, second) for item in plan.items() for ref in item.inputs):
        return None  # overlays belong to one of the two
    made = {spec.name: item for item in first.items() for spec in item.outputs}
    shards = []
    for shard in second.shards:
        items = [_through(item, made) for item in shard.items]
        if any(item is None for item in items):
            return None
        shards.append(Shard(shard.name, tuple(item for item in items if item is not None)))
    return replace(
        second,
        identity=first.identity,
        shards=tuple(shards),
        warnings=(*first.warnings, *second.warnings),
        dropped=first.dropped,
        promise={**first.promise, **second.promise},
        earlier=(*first.earlier, first),
    )


def _through(item: Item, made: Mapping[str, Item]) -> Item | None:
    """An item of the second plan that reads the first one's source."""
    inputs: list[Input] = []
    for ref in item.inputs:
        maker = made[ref.tensor]
        if _whole(item, ref, maker) and (item.kernel == "copy" or maker.kernel != "copy" or len(maker.inputs) > 1):
            return _joined(item, maker)
        traced = _range(ref, maker)
        if traced is None:
            return None
        inputs.append(traced)
    moved = [made[ref.tensor].changed for ref in item.inputs]
    return replace(item, inputs=tuple(inputs), changed=item.changed or next(filter(None, moved), ""))


def _whole(item: Item, ref: Input, maker: Item) -> bool:
    """Whether the item reads one tensor of the first plan and that whole."""
    sizes = [spec.nbytes for spec in maker.outputs if spec.name == ref.tensor]
    return len(item.inputs) == 1 and ref.start == 0 and sizes == [ref.nbytes]


def _joined(item: Item, maker: Item) -> Item | None:
    """What the maker makes, under the item's name, or with the item's kernel after it."""
    if len(maker.outputs) != 1 or maker.outputs[0].nbytes != item.inputs[0].nbytes:
        return None
    changed = item.changed or maker.changed
    if item.kernel == "copy":
        return Item(item.outputs, maker.kernel, maker.inputs, maker.params, changed)
    (between,) = maker.outputs
    shape = item.inputs[0].shape
    params = {
        "first": {"kernel": maker.kernel, "params": dict(maker.params)},
        "between": [between.name, between.dtype, list(shape)],
        "then": {"kernel": item.kernel, "params": dict(item.params)},
    }
    return Item(item.outputs, "chain", maker.inputs, params, changed)


def _range(ref: Input, maker: Item) -> Input | None:
    """The bytes of the source behind a range of what a copy makes, where they lie in one of the ranges that it
    joins."""
    start = ref.start
    for source in maker.inputs if maker.kernel == "copy" else ():
        if start >= 0 and start + ref.nbytes <= source.nbytes:
            return replace(source, dtype=ref.dtype, shape=ref.shape, start=source.start + start, nbytes=ref.nbytes)
        start -= source.nbytes
    return None
