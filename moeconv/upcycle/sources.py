"""The tensors behind an expression's leaves: those of the source and of its siblings.

An expression names tensors by their key in the family's table. A key may be stored inside a fused tensor, whose rows
are then a range of its bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from moeconv.checkpoint.header import FLOAT_DTYPES, tensor_nbytes
from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.errors import InputError
from moeconv.families.model import Model
from moeconv.families.node import Node, from_origin, low_rank, measured
from moeconv.families.shapes import fused_rows
from moeconv.plan.build import rows, whole
from moeconv.plan.plan import Input
from moeconv.upcycle.adapter import Adapter
from moeconv.upcycle.siblings import Sibling

UNPACKED = "Upcycle the unquantized checkpoint, then `moeconv quantize`."

_Refs = dict[tuple[str, int | None], TensorRef]  # by key and layer


def sibling_origin(index: int) -> str:
    """The origin of a sibling's tensors in a plan's inputs, by its position in --experts-from."""
    return f"source:{index + 1}"


@dataclass(frozen=True)
class Sources:
    """The source and its siblings, which have the source's layout or are adapters of it."""

    model: Model
    siblings: Sequence[Sibling] = ()

    @cached_property
    def _refs(self) -> _Refs:
        return _refs_of(self.model)

    @cached_property
    def _sibling_refs(self) -> dict[str, _Refs]:
        models = ((i, sibling) for i, sibling in enumerate(self.siblings) if isinstance(sibling, Model))
        return {sibling_origin(i): _refs_of(sibling) for i, sibling in models}

    @cached_property
    def _position(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.model.checkpoint.tensors)}

    def _stored_key(self, leaf: Node) -> str:
        """The key of the tensor on disk that holds the leaf's."""
        key: str = leaf.params["key"]
        return self.model.family.holds(key) or key

    def ref(self, leaf: Node, layer: int | None) -> TensorRef:
        """The stored tensor behind a leaf `source`."""
        refs = self._sibling_refs[leaf.params["origin"]] if "origin" in leaf.params else self._refs
        return refs[self._stored_key(leaf), layer]

    def has(self, node: Node, layer: int | None) -> bool:
        """Whether a layer has every tensor that the expression reads."""
        return all(leaf.op != "source" or (self._stored_key(leaf), layer) in self._refs for leaf in node.leaves())

    def of_sibling(self, node: Node, index: int, layer: int) -> Node:
        """The expression over the tensors of a sibling. For an adapter, those are the source's plus its products."""
        sibling, origin = self.siblings[index], sibling_origin(index)
        if not isinstance(sibling, Adapter):
            return from_origin(node, origin)
        if node.of:
            return Node(node.op, tuple(self.of_sibling(child, index, layer) for child in node.of), node.params)
        factors = sibling.factors.get((self._stored_key(node), layer)) if node.op == "source" else None
        if factors is None:
            return node
        first, count = self._rows(node, self.ref(node, layer))
        width = factors.b.shape[1]
        a = measured(factors.a.name, dtype=factors.a.dtype, shape=factors.a.shape, origin=origin)
        shape = (count, width)
        b = measured(factors.b.name, dtype=factors.b.dtype, shape=shape, first=first * width, origin=origin)
        return low_rank(node, b, a, factors.by)

    def changes(self, node: Node) -> bool:
        """Whether the expression is more than one stored tensor as it is: it computes, or takes a fused one apart."""
        return node.op != "source" or not self.model.family.has(node.params["key"])

    def input(self, leaf: Node, layer: int | None) -> Input:
        """The bytes behind a leaf `source` or `read`."""
        if leaf.op == "read":
            return _measured(leaf)
        ref, origin = self.ref(leaf, layer), leaf.params.get("origin", "source")
        first, count = self._rows(leaf, ref)
        return whole(ref, origin=origin) if count == ref.shape[0] else rows(ref, first, count, origin=origin)

    def _rows(self, leaf: Node, ref: TensorRef) -> tuple[int, int]:
        """(first, count) of the rows of the stored tensor that a leaf `source` refers to."""
        key, stored = leaf.params["key"], self._stored_key(leaf)
        first, count = 0, ref.shape[0]
        if stored != key:
            first, count = fused_rows(key, self.model.family.tensors.fused[stored], ref.shape[0], self.model.value)
        if (chosen := leaf.params.get("rows")) is not None:
            first, count = first + chosen[0], chosen[1] - chosen[0]
        return first, count

    def position(self, node: Node, layer: int | None) -> int:
        """The position in the source's files of the first tensor that the expression reads; 0 for one that reads
        none."""
        stored = (self._refs[self._stored_key(leaf), layer] for leaf in node.leaves() if leaf.op == "source")
        return min((self._position[ref.name] for ref in stored), default=0)

    def position_of(self, name: str) -> int:
        """The position of a tensor in the source's files."""
        return self._position[name]

    def dtype(self, key: str, node: Node, layer: int | None) -> str:
        """The dtype of the first tensor that the expression for `key` reads, by the source's own tensor also where it
        reads a sibling's. Raises InputError where it computes with a dtype that is not a float."""
        stored = (self._refs[self._stored_key(leaf), layer] for leaf in node.leaves() if leaf.op == "source")
        own = next((ref.dtype for ref in stored), self.model.dtype)
        if own not in FLOAT_DTYPES and node.op != "source":
            raise InputError(
                f"the source's tensor for {key} is {own}: only {', '.join(FLOAT_DTYPES)} can be computed with",
                hint=UNPACKED,
            )
        return own

    def shape(self, node: Node, layer: int | None) -> tuple[int, ...]:
        """The shape of the tensor that the expression makes."""
        if node.op in ("source", "read"):
            return self.input(node, layer).shape
        if node.op == "fill":
            return tuple(node.params["shape"])
        if node.op in ("cut", "deal", "take"):
            inside = list(self.shape(node.of[0], layer))
            count = node.params.get("count")
            inside[node.params["axis"]] = node.params["stop"] - node.params["start"] if count is None else count
            return tuple(inside)
        shapes = [self.shape(child, layer) for child in node.of]
        if node.op in ("concat", "interleave"):
            return (sum(shape[0] for shape in shapes), *shapes[0][1:])
        return shapes[0][::-1] if node.op == "transpose" else shapes[0]


def _refs_of(model: Model) -> _Refs:
    tensors = model.checkpoint.tensors
    return {(role.key, role.layer): tensors[name] for name, role in model.roles.items()}


def _measured(leaf: Node) -> Input:
    """Elements of a file that a measurement writes. The expression has their sizes, so the file need not exist yet."""
    at, shape = leaf.params, tuple(leaf.params["shape"])
    size = tensor_nbytes(at["dtype"], (1,))
    return Input(at["tensor"], at["dtype"], shape, at["first"] * size, math.prod(shape) * size, at["origin"])
