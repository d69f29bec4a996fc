"""From an expression of families/node.py to the item that makes a tensor; a plain copy where bytes only move."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from moeconv.checkpoint.header import FLOAT_DTYPES
from moeconv.families.node import Node
from moeconv.plan.plan import Input, Item, TensorSpec

Resolve = Callable[[Node], Input]
_DRAWS = {"draw": "draw_normal", "fill": "fill"}
_INPUTS = ("source", "read")
_EDITS = ("add_noise", "redraw_neurons")


def item_of(node: Node, spec: TensorSpec, *, resolve: Resolve, changed: str = "") -> Item:
    """The item that makes the tensor `spec` from the expression; `resolve` gives the bytes behind a leaf `source` or
    `read`. `changed` is the role under which the tensor counts as changed, "" where it does not."""
    if node.op in _DRAWS:
        return Item((spec,), _DRAWS[node.op], (), dict(node.params), changed)
    pieces = list(_pieces(node))
    if all(piece.op in _INPUTS for piece in pieces):
        inputs = tuple(resolve(piece) for piece in pieces)
        if all(ref.dtype == spec.dtype for ref in inputs):
            return Item((spec,), "copy", inputs, {}, changed)
        if len(inputs) == 1 and inputs[0].dtype in FLOAT_DTYPES:
            return Item((spec,), "cast", inputs, {}, changed)
    if node.op in _EDITS and node.of[0].op in _INPUTS:
        return Item((spec,), node.op, (resolve(node.of[0]),), dict(node.params), changed)
    inputs_seen: dict[Input, int] = {}
    tree = _tree(node, lambda leaf: inputs_seen.setdefault(resolve(leaf), len(inputs_seen)))
    return Item((spec,), "compute", tuple(inputs_seen), {"tree": tree}, changed)


def _pieces(node: Node) -> Iterator[Node]:
    """The parts of a concatenation, nested or not."""
    if node.op != "concat":
        yield node
        return
    for child in node.of:
        yield from _pieces(child)


def _tree(node: Node, index: Callable[[Node], int]) -> list[object]:
    """The expression as the JSON of the kernel `compute`: [op, params, children]."""
    if node.op in _INPUTS:
        return ["input", {"index": index(node)}, []]
    return [node.op, dict(node.params), [_tree(child, index) for child in node.of]]
