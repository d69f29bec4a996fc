"""Two kernels as one, for plans that were fused: what the first makes never leaves memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moeconv.plan.kernels import Buffer, load_kernel
from moeconv.plan.plan import Input, Item, TensorSpec


def chain(
    inputs: Sequence[tuple[Input, Buffer]], outputs: Sequence[TensorSpec], params: Mapping[str, Any]
) -> Sequence[Buffer]:
    """The kernel `then` on what `first` makes. params: first and then (kernel, params), between."""
    then = params["then"]
    if then["kernel"] == "copy":
        return [between(inputs, params)[1]]
    return load_kernel(then["kernel"])([between(inputs, params)], outputs, then["params"])


def between(inputs: Sequence[tuple[Input, Buffer]], params: Mapping[str, Any]) -> tuple[Input, Buffer]:
    """What the second kernel is given. params["between"]: name, dtype and shape of what the first one makes, and where
    in it (bytes) the part of which shape begins that the second one reads."""
    name, dtype, shape, start, part = params["between"]
    spec, first = TensorSpec(name, dtype, tuple(shape), "", 0), params["first"]
    if first["kernel"] == "copy":
        data: Buffer = bytearray(b"".join(part for _, part in inputs))
    else:
        (data,) = load_kernel(first["kernel"])(inputs, (spec,), first["params"])
    read = TensorSpec(name, dtype, tuple(part), "", 0)
    view = memoryview(data).cast("B")[start : start + read.nbytes]
    return Input(name, dtype, read.shape, 0, read.nbytes), bytearray(view) if view.readonly else view


def last_stage(item: Item) -> Item:
    """An item as its last kernel sees it: of a chain, the second kernel on what lies between."""
    if item.kernel != "chain":
        return item
    name, dtype, _, _, shape = item.params["between"]
    ref, then = TensorSpec(name, dtype, tuple(shape), "", 0), item.params["then"]
    read = Input(name, dtype, ref.shape, 0, ref.nbytes)
    return Item(item.outputs, then["kernel"], (read,), then["params"], item.changed)
