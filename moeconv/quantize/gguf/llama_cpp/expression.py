"""A tensor of the source on its way to a tensor of the file, as an expression of the kernel `compute`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Tree = list[object]  # [op, params, children], as kernels/layout.py evaluates it
_INPUT: Tree = ["input", {"index": 0}, []]


@dataclass(frozen=True, slots=True)
class Expression:
    """What becomes of one tensor. `shape` is the result's. `tree` is None where the bytes stay as they are, maybe in
    another shape. `computed`: the values change, in float32; otherwise values only move."""

    shape: tuple[int, ...]
    tree: Tree | None = None
    computed: bool = False

    def reshape(self, *shape: int) -> Expression:
        """The same values in another shape; one size may be -1."""
        known = math.prod(n for n in shape if n >= 0)
        sizes = tuple(math.prod(self.shape) // known if n < 0 else n for n in shape)
        if math.prod(sizes) != math.prod(self.shape):
            raise ValueError(f"{list(self.shape)} cannot become {list(sizes)}")
        if self.tree is None:
            return Expression(sizes)
        return Expression(sizes, ["reshape", {"shape": list(sizes)}, [self.tree]], self.computed)

    def permute(self, *axes: int) -> Expression:
        """The axes in another order."""
        return Expression(
            tuple(self.shape[axis] for axis in axes), ["permute", {"axes": list(axes)}, [self.grown()]], self.computed
        )

    def cut(self, axis: int, start: int, stop: int) -> Expression:
        """Entries `start` to `stop` of one axis."""
        if not 0 <= start < stop <= self.shape[axis]:
            raise ValueError(f"{start}:{stop} of axis {axis} of {list(self.shape)}")
        shape = (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])
        where = {"axis": axis, "start": start, "stop": stop}
        return Expression(shape, ["cut", where, [self.grown()]], self.computed)

    def split(self, axis: int, sizes: Sequence[int]) -> list[Expression]:
        """The axis in consecutive parts of those sizes, which must be all of it."""
        if sum(sizes) != self.shape[axis]:
            raise ValueError(f"{list(sizes)} of axis {axis} of {list(self.shape)}")
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [self.cut(axis, start, start + size) for start, size in zip(starts, sizes, strict=True)]

    def add(self, what: float) -> Expression:
        """The number `what` added to every value."""
        return Expression(self.shape, ["add", {"what": what}, [self.grown()]], computed=True)

    def negative_exp(self) -> Expression:
        """-exp(x) of every value x."""
        return Expression(self.shape, ["negative_exp", {}, [self.grown()]], computed=True)

    def grown(self) -> Tree:
        """The expression so far; where it is the tensor itself, in the shape that the part has."""
        return ["reshape", {"shape": list(self.shape)}, [_INPUT]] if self.tree is None else self.tree


def join(axis: int, parts: Sequence[Expression]) -> Expression:
    """Parts of one tensor, one after the other along an axis."""
    size = sum(part.shape[axis] for part in parts)
    shape = (*parts[0].shape[:axis], size, *parts[0].shape[axis + 1 :])
    return Expression(shape, ["concat", {"axis": axis}, [part.grown() for part in parts]], parts[0].computed)
