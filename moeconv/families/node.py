"""Expressions that compute a target tensor from source tensors: pure data, which a plan compiles into one item.

Operations that only move values (`concat`, `rotary`, `transpose`, `interleave`) keep their bits. Arithmetic (`scale`,
`add`, `centre`, `low_rank`) is done in float32 and rounded once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from moeconv.types import Config


@dataclass(frozen=True, slots=True)
class Node:
    """An operation on the nodes `of`.

    A leaf has no such nodes. It is `source` (params: key; optionally rows and origin), `read` (rows of a tensor of
    another origin), `fill` (value) or `draw` (random values; key, std).
    """

    op: str
    of: tuple[Node, ...] = ()
    params: Config = field(default_factory=dict)

    def leaves(self) -> Iterator[Node]:
        """The leaves, from left to right."""
        if not self.of:
            yield self
        for child in self.of:
            yield from child.leaves()


def source(key: str) -> Node:
    """The source's tensor with that key, in the current layer."""
    return Node("source", (), {"key": key})


def measured(
    tensor: str, *, dtype: str, shape: tuple[int, ...], first: int = 0, origin: str = "partition"
) -> Node:  # fmt: skip
    """As many elements as `shape` has, from element `first` on, of `tensor` in a file that a command measures first.

    `dtype` and `shape` are stated, so that a plan can be made before the file exists.
    """
    params = {"tensor": tensor, "origin": origin, "dtype": dtype, "shape": list(shape), "first": first}
    return Node("read", (), params)


def from_origin(node: Node, origin: str) -> Node:
    """The same expression over another model's tensors ("source:1")."""
    if node.op == "source":
        return Node("source", (), {**node.params, "origin": origin})
    return Node(node.op, tuple(from_origin(child, origin) for child in node.of), node.params)


def cut(node: Node, *, axis: int, start: int, stop: int) -> Node:
    """Rows (axis 0) or columns (axis 1) `start` to `stop`; rows of a source's tensor remain one range of its bytes."""
    if node.op == "scale":
        return scale(cut(node.of[0], axis=axis, start=start, stop=stop), node.params["by"])
    if node.op == "source" and axis == 0 and "rows" not in node.params:
        return Node("source", (), {**node.params, "rows": [start, stop]})
    return Node("cut", (node,), {"axis": axis, "start": start, "stop": stop})


def take(node: Node, indices: Node, *, axis: int, count: int) -> Node:
    """The `count` rows (axis 0) or columns (axis 1) at the whole numbers in `indices`, in that order."""
    return Node("take", (node, indices), {"axis": axis, "count": count})


def deal(node: Node, *, axis: int, key: list[Any], start: int, stop: int) -> Node:
    """Entries `start` to `stop` of a random permutation, seeded by `key`, of the rows (axis 0) or columns (axis 1)."""
    return Node("deal", (node,), {"axis": axis, "key": key, "start": start, "stop": stop})


def fill(value: float) -> Node:
    """A constant of the output's shape."""
    return Node("fill", (), {"value": value})


def scale(node: Node, by: float) -> Node:
    """The node with every value multiplied by `by`; nested factors are merged, so that values are rounded only once."""
    if node.op == "scale":
        return scale(node.of[0], node.params["by"] * by)
    return node if by == 1 else Node("scale", (node,), {"by": by})


def scale_rows(node: Node, by: float, *, head: int, start: int, stop: int) -> Node:
    """The node with rows `start` to `stop` of every head of `head` rows multiplied by `by`."""
    return node if by == 1 else Node("scale_rows", (node,), {"by": by, "head": head, "start": start, "stop": stop})


def add(node: Node, what: float) -> Node:
    """The node with the number `what` added to every value."""
    return node if what == 0 else Node("add", (node,), {"what": what})


def centre(node: Node, axis: int) -> Node:
    """The node minus its mean along `axis`."""
    return Node("centre", (node,), {"axis": axis})


def unit_rows(node: Node) -> Node:
    """The node with every row divided by its length (torch's `normalize`)."""
    return Node("unit_rows", (node,), {})


def low_rank(node: Node, left: Node, right: Node, by: float) -> Node:
    """The node [out, in] plus `by` times the product of `left` [out, r] and `right` [r, in]."""
    return Node("low_rank", (node, left, right), {"by": by})


def concat(*nodes: Node) -> Node:
    """The rows of the first node, then those of the second, and so on."""
    return nodes[0] if len(nodes) == 1 else Node("concat", nodes)


def interleave(*nodes: Node) -> Node:
    """Row 0 of each node, then row 1 of each, and so on."""
    return Node("interleave", nodes)


def transpose(node: Node) -> Node:
    """The transpose of a matrix: [a, b] becomes [b, a]."""
    return Node("transpose", (node,))


def rotary(node: Node, *, head: int, start: int, size: int, order: str) -> Node:
    """The node with `size` rows from row `start` on, in every head of `head` rows, in another rotary order.

    `order` is "half" (pairs side by side become two halves), "interleaved" (the reverse), or "spread" (the two halves
    of the first `size` rows become the beginnings of the two halves of the whole head; rows that do not rotate fill up
    each half).
    """
    return Node("rotary", (node,), {"head": head, "start": start, "size": size, "order": order})
