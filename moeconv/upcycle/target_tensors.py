"""One tensor of an upcycled checkpoint as an item: its name, shape and dtype, and the expression that makes it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from moeconv.checkpoint.header import FLOAT_DTYPES
from moeconv.families.folds import Draft
from moeconv.families.node import Node, fill
from moeconv.families.shapes import shape_of, shared_width
from moeconv.families.spec import Family
from moeconv.plan.plan import Item, TensorSpec
from moeconv.upcycle.cut import Cut
from moeconv.upcycle.expression import item_of
from moeconv.upcycle.sources import Sources

_F16_LOWEST = -6e4  # float16 ends at -65504

Placed = tuple[int, Item]  # (position in the source's files, item)


@dataclass(frozen=True)
class TargetTensors:
    """The names, shapes and dtypes of the target's tensors. `dtype` is that of the output, None for the source's."""

    draft: Draft
    sources: Sources
    cut: Cut
    dtype: str | None
    rounded: list[str] = field(default_factory=list)  # keys whose folds do not fit the output's dtype exactly

    @property
    def target(self) -> Family:
        return self.draft.target

    @property
    def shared_width(self) -> int:
        """The neurons of the target's shared expert, 0 where it has none."""
        return shared_width(self.target.experts.shared_width, self.draft.config.get)

    def item(
        self, key: str, layer: int | None, node: Node, *, expert: int | None = None,
        shape: tuple[int, ...] | None = None, changed: str = "", like: Node | None = None,
    ) -> Placed:  # fmt: skip
        """The item of the tensor `key`, with its position. A tensor that is made from nothing takes its dtype from the
        expression `like`."""
        node = node if shape is not None and node.op == "fill" else self.with_shape(key, node)
        if shape is None:
            by_config = node.op == "draw" or key.startswith("router.")
            shape = self.shape_of(key) if by_config else self.sources.shape(node, layer)
        dtype = self._dtype(key, like or node, layer)
        if node.op == "fill" and dtype == "F16":
            node = fill(max(node.params["value"], _F16_LOWEST))
        if dtype in ("BF16", "F16") and _rounds(node):
            self.rounded.append(key)
        spec = TensorSpec(self.target.name(key, layer=layer, expert=expert), dtype, shape, key, math.prod(shape))
        item = item_of(node, spec, resolve=lambda leaf: self.sources.input(leaf, layer), changed=changed)
        return self.sources.position(node, layer), item

    def with_shape(self, key: str, node: Node) -> Node:
        """A constant gets the shape of the tensor `key`; other expressions know theirs."""
        if node.op == "fill" and "shape" not in node.params:
            return Node("fill", (), {"value": node.params["value"], "shape": list(self.shape_of(key))})
        return node

    def shape_of(self, key: str) -> tuple[int, ...]:
        """The shape of the tensor `key` by the target's config."""
        counts = {
            "experts": lambda: self.cut.experts,
            "width": lambda: self.sources.model.ffn_width,
            "shared": lambda: self.shared_width,
        }
        tensors, get = self.target.tensors, self.draft.config.get
        parts = [
            shape_of(part, get, counts=counts, shapes=tensors.shapes, sizes=tensors.sizes)
            for part in tensors.fused.get(key, (key,))
        ]
        return (sum(shape[0] for shape in parts), *parts[0][1:])

    def _dtype(self, key: str, node: Node, layer: int | None) -> str:
        own = self.sources.dtype(key, node, layer)
        if own not in FLOAT_DTYPES:
            return own
        return "F32" if key in self.target.tensors.float32 else self.dtype or own


def _rounds(node: Node) -> bool:
    """Whether an expression's values may need more bits than the source's. Movements and powers of two never do."""
    if node.op in ("add", "centre", "unit_rows", "low_rank"):
        return True
    if node.op in ("scale", "scale_rows") and math.frexp(node.params["by"])[0] not in (0.5, -0.5):
        return True
    return any(_rounds(child) for child in node.of)
