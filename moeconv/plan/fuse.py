"""Two plans as one: the second was planned on the output of the first, and both run in one pass.

Tensors, config and companions are the same as of the two plans one after the other. The checkpoint between them is
never written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from moeconv.checkpoint.header import tensor_nbytes
from moeconv.plan.plan import Input, Item, Plan

Made = dict[str, list[Item]]  # tensor -> the item that makes it, or the items that make its slices


def fuse(first: Plan, second: Plan) -> Plan | None:
    """`second` with its inputs traced back through `first` to the source of `first`; None where that is impossible.

    `second` must have been planned on `planned_model(first)`. Its inputs from an overlay stay as they are. Where both
    change a role, the count of `second` holds.
    """
    if any(ref.origin != "source" for item in first.items() for ref in item.inputs):
        return None  # the two plans may give one name to two overlays
    made: Made = {}
    for item in first.items():
        for spec in item.outputs:
            made.setdefault(spec.name, []).append(item)
    shards = []
    for shard in second.shards:
        items = [_through(part, made) for item in shard.items for part in _slices(item, made)]
        if any(item is None for item in items):
            return None
        shards.append(replace(shard, items=tuple(item for item in items if item is not None)))
    return replace(
        second,
        identity=first.identity,
        shards=tuple(shards),
        warnings=tuple(dict.fromkeys((*first.warnings, *second.warnings))),
        dropped=first.dropped,
        promise=_promise(first, second, made),
        earlier=(*first.earlier, first),
    )


def _promise(first: Plan, second: Plan, made: Mapping[str, Sequence[Item]]) -> dict[str, int]:
    """The promise of both plans. Where the first promises nothing, the tensors that it changes and the second only
    carries over are counted here."""
    if first.promise or not second.promise:
        return {**first.promise, **second.promise}
    promise = dict(second.promise)
    for item in second.items():
        if not item.changed and (role := _moved(item, made)):
            promise[role] = promise.get(role, 0) + len(item.outputs)
    return promise


def _moved(item: Item, made: Mapping[str, Sequence[Item]]) -> str:
    """The role under which the first plan counts the tensors that an item reads; "" where they are unchanged."""
    changed = (made[ref.tensor][0].changed for ref in item.inputs if ref.origin == "source")
    return next(filter(None, changed), "")


def _through(item: Item, made: Mapping[str, Sequence[Item]]) -> Item | None:
    """An item of the second plan as one that reads the source of the first; None where that is impossible."""
    inputs: list[Input] = []
    for ref in item.inputs:
        if ref.origin != "source":
            inputs.append(ref)
            continue
        makers = made[ref.tensor]
        maker = makers[0]
        if len(makers) > 1:
            maker, ref = _maker(ref, makers)
            item = replace(item, inputs=(ref,)) if len(item.inputs) == 1 else item
        if _whole(item, ref, maker) and (item.kernel == "copy" or maker.kernel != "copy" or len(maker.inputs) > 1):
            return _joined(item, maker)
        traced = _range(ref, maker)
        if traced is None and len(item.inputs) > 1:
            return _gathered(item, made)
        if traced is None:
            return _cut(item, maker) if maker.kernel == "decode" else None
        inputs.append(traced)
    return replace(item, inputs=tuple(inputs), changed=item.changed or _moved(item, made))


def _slices(item: Item, made: Mapping[str, Sequence[Item]]) -> list[Item]:
    """The item itself; or one item per slice, where it copies or casts a whole tensor that several items make."""
    makers = made.get(item.inputs[0].tensor, ()) if len(item.inputs) == 1 else ()
    if len(makers) < 2 or item.kernel not in ("copy", "cast") or item.inputs[0].origin != "source":
        return [item]
    (whole,), (spec,) = item.inputs, item.outputs
    if whole.nbytes != sum(maker.outputs[0].nbytes for maker in makers):
        return [item]
    parts, start = [], 0
    for maker in makers:
        (one,) = maker.outputs
        part = spec._replace(shape=one.shape, params=spec.params // one.of, at=one.at, of=one.of)
        ref = whole._replace(shape=one.shape, start=start, nbytes=one.nbytes)
        parts.append(replace(item, outputs=(part,), inputs=(ref,)))
        start += one.nbytes
    return parts


def _maker(ref: Input, items: Sequence[Item]) -> tuple[Item, Input]:
    """Of the items that each make one slice of a tensor, the one whose slice contains the range `ref`, and the range
    within the slice."""
    size = next(spec.nbytes for spec in items[0].outputs if spec.name == ref.tensor)
    at = ref.start // size
    return items[at], ref._replace(start=ref.start - at * size)


def _whole(item: Item, ref: Input, maker: Item) -> bool:
    """Whether the item reads exactly one whole tensor of the first plan."""
    sizes = [spec.nbytes for spec in maker.outputs if spec.name == ref.tensor]
    return len(item.inputs) == 1 and ref.start == 0 and sizes == [ref.nbytes]


def _joined(item: Item, maker: Item) -> Item | None:
    """The maker's work under the name of the item, followed by the item's kernel where that is not a copy."""
    if len(maker.outputs) != 1 or maker.outputs[0].nbytes != item.inputs[0].nbytes:
        return None
    if item.kernel == "copy":
        return Item(item.outputs, maker.kernel, maker.inputs, maker.params, item.changed or maker.changed)
    return _chain(item, maker, maker.inputs, maker.outputs[0].shape, 0)


def _chain(item: Item, maker: Item, inputs: Sequence[Input], shape: Sequence[int], start: int) -> Item:
    """The maker's kernel on `inputs`, whose output has the shape `shape`, and then the item's kernel on the bytes of it
    from `start` on."""
    (between,), (ref,) = maker.outputs, item.inputs
    params = {
        "first": {"kernel": maker.kernel, "params": dict(maker.params)},
        "between": [between.name, between.dtype, list(shape), start, list(ref.shape)],
        "then": {"kernel": item.kernel, "params": dict(item.params)},
    }
    return Item(item.outputs, "chain", tuple(inputs), params, item.changed or maker.changed)


def _gathered(item: Item, made: Mapping[str, Sequence[Item]]) -> Item | None:
    """An item of several inputs, each of which another kernel makes; None where that is impossible for one of them."""
    firsts, inputs = [], list[Input]()
    for ref in item.inputs:
        one: Item | None = replace(item, kernel="gather", inputs=(ref,), params={})
        if one is not None and ref.origin == "source":
            one = _through(one, made)
        if one is None:
            return None
        if one.kernel == "chain":
            first = {"first": one.params["first"], "between": one.params["between"]}
        else:  # a range of bytes
            first = {
                "first": {"kernel": "copy", "params": {}},
                "between": [ref.tensor, ref.dtype, list(ref.shape), 0, list(ref.shape)],
            }
        firsts.append(first | {"count": len(one.inputs)})
        inputs += one.inputs
    params = {"firsts": firsts, "then": {"kernel": item.kernel, "params": dict(item.params)}}
    return Item(item.outputs, "gather", tuple(inputs), params, item.changed)


def _cut(item: Item, maker: Item) -> Item:
    """The item on a part of the weight that the maker decodes. Of a tensor of all experts, only the experts in that
    part are decoded."""
    (ref,), (whole,) = item.inputs, maker.outputs
    if not whole.shape or any(not part.shape for part in maker.inputs):
        return _chain(item, maker, maker.inputs, whole.shape, ref.start)
    row = tensor_nbytes(whole.dtype, whole.shape[1:])
    first = ref.start // row
    count = -(-(ref.start + ref.nbytes) // row) - first
    shared = maker.params.get("shared", [False] * len(maker.inputs))
    if len(whole.shape) < 3 or any(p.shape[0] != whole.shape[0] for p, s in zip(maker.inputs, shared) if not s):
        return _chain(item, maker, maker.inputs, whole.shape, ref.start)
    inputs = [part if s else _rows(part, first, count) for part, s in zip(maker.inputs, shared, strict=True)]
    return _chain(item, maker, inputs, (count, *whole.shape[1:]), ref.start - first * row)


def _rows(ref: Input, first: int, count: int) -> Input:
    size = ref.nbytes // ref.shape[0]
    return ref._replace(shape=(count, *ref.shape[1:]), start=ref.start + first * size, nbytes=count * size)


def _range(ref: Input, maker: Item) -> Input | None:
    """The source bytes behind a range of a copied tensor, where one of the ranges that the copy joins has them all."""
    start = ref.start
    for source in maker.inputs if maker.kernel == "copy" else ():
        if start >= 0 and start + ref.nbytes <= source.nbytes:
            return source._replace(dtype=ref.dtype, shape=ref.shape, start=source.start + start, nbytes=ref.nbytes)
        start -= source.nbytes
    return None
