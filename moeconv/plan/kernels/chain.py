"""Two kernels as one, for fused plans: the output of the first kernel, or of several, stays in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moeconv.plan.kernels import Buffer, load_kernel
from moeconv.plan.plan import Input, Item, Params, TensorSpec


def chain(inputs: Sequence[tuple[Input, Buffer]], outputs: Sequence[TensorSpec], params: Params) -> Sequence[Buffer]:
    """The kernel `then` on the output of `first`. params: first and then (each with kernel and params), between;
    untouched: the inputs are what both would make of them, or what a kernel of that name makes these of."""
    then, untouched = params["then"], params.get("untouched")
    if untouched:
        same = [data for _, data in inputs]
        return same if untouched is True else load_kernel(untouched)(inputs, outputs, then["params"])
    if then["kernel"] == "copy":
        return [between(inputs, params)[1]]
    return load_kernel(then["kernel"])([between(inputs, params)], outputs, then["params"])


def between(inputs: Sequence[tuple[Input, Buffer]], params: Params) -> tuple[Input, Buffer]:
    """The input of the second kernel. params["between"] is [name, dtype, shape, start, part]: the output of the first
    kernel, and the part of it that the second one reads, by its first byte `start` and its shape `part`."""
    name, dtype, shape, start, part = params["between"]
    spec, first = TensorSpec(name, dtype, tuple(shape), "", 0), params["first"]
    if first["kernel"] == "copy":
        data: Buffer = bytearray(b"".join(part for _, part in inputs))
    else:
        (data,) = load_kernel(first["kernel"])(inputs, (spec,), first["params"])
    read = TensorSpec(name, dtype, tuple(part), "", 0)
    view = memoryview(data).cast("B")[start : start + read.nbytes]
    return Input(name, dtype, read.shape, 0, read.nbytes), bytearray(view) if view.readonly else view


def gather(inputs: Sequence[tuple[Input, Buffer]], outputs: Sequence[TensorSpec], params: Params) -> Sequence[Buffer]:
    """The kernel `then` on the outputs of several first kernels. params: then (kernel and params), and firsts, which
    has for each of them the number of its inputs `count`, and first and between as in `chain`."""
    then, made = params["then"], gathered(inputs, params)
    if then["kernel"] == "copy":
        return [b"".join(data for _, data in made)]
    return load_kernel(then["kernel"])(made, outputs, then["params"])


def gathered(inputs: Sequence[tuple[Input, Buffer]], params: Params) -> list[tuple[Input, Buffer]]:
    """The inputs of the second kernel of `gather`."""
    found, at = [], 0
    for first in params["firsts"]:
        found.append(between(inputs[at : at + first["count"]], first))
        at += first["count"]
    return found


def last_stage(item: Item) -> Item:
    """An item with its last kernel alone: of a chain or a gather, the kernel on the tensors between."""
    while item.kernel in ("chain", "gather"):
        firsts, then = item.params.get("firsts", (item.params,)), item.params["then"]
        read = tuple(_between_ref(first["between"]) for first in firsts)
        item = Item(item.outputs, then["kernel"], read, then["params"], item.changed)
    return item


def _between_ref(between: Sequence[Any]) -> Input:
    """The tensor between two kernels, as an input."""
    name, dtype, _, _, shape = between
    spec = TensorSpec(name, dtype, tuple(shape), "", 0)
    return Input(name, dtype, spec.shape, 0, spec.nbytes)
