"""Grids of levels (the values that codes stand for), and matrices whose values are on a grid, for any format."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Grid:
    """The levels of a number format, float32 ascending: a weight is level * scale. `top` is the level to which
    round-to-nearest maps the largest magnitude of a group. `dtype` is the dtype of the stored scales."""

    levels: Tensor
    top: float
    dtype: torch.dtype

    @cached_property
    def key(self) -> tuple[object, ...]:
        """A key that is equal for equal grids."""
        return tuple(self.levels.tolist()), self.top, self.dtype

    @cached_property
    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest level."""
        return float(self.levels[0]), float(self.levels[-1])

    @cached_property
    def integers(self) -> bool:
        """Whether the levels are all the integers between the bounds."""
        return bool((self.levels.diff() == 1).all()) and self.bounds[0].is_integer()

    @cached_property
    def symmetric(self) -> bool:
        """Whether every level has its negative, so that negative scales add nothing."""
        return bool(torch.equal(self.levels, -self.levels.flip(0)))

    def nearest(self, x: Tensor) -> Tensor:
        """The nearest level to each entry of `x`, float32; `x` may be overwritten."""
        if self.integers:
            return x.round_().clamp_(*self.bounds)
        if x.device.type != "cpu" or self._lookup is None:
            return self._searched(x)
        return self._lookup.nearest(x)

    def stored(self, scales: Tensor) -> Tensor:
        """The scales as a file stores them, in float32; never zero."""
        tiny = torch.finfo(self.dtype).eps
        return scales.to(self.dtype).float().masked_fill(scales.abs() < 1e-30, tiny)

    def _searched(self, x: Tensor) -> Tensor:
        levels = self.levels.to(x.device)
        return levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]

    @cached_property
    def _lookup(self) -> _Lookup | None:
        return _Lookup.of(self.levels)


class _Lookup:
    """Finds the nearest of unevenly spaced levels by a table of bins, each of which contains at most one midpoint
    between two levels. On the CPU, this is ten times faster than a binary search. The bin of a value is monotonic in
    the value, so that the result is exact for every float."""

    LARGEST = 1 << 14

    def __init__(self, levels: Tensor, middle: Tensor, scale: float, reach: float) -> None:
        self.scale, self.reach = scale, reach
        bins, every = _bins(middle, scale, reach), torch.arange(2 * int(reach * scale) + 1)
        below = torch.searchsorted(bins, every)  # midpoints in the bins below
        self.middle = torch.full((len(every),), torch.inf)
        self.middle[bins] = middle
        self.levels = torch.stack([levels[below], levels[(below + 1).clamp(max=len(middle))]], -1).flatten()

    @classmethod
    def of(cls, levels: Tensor) -> _Lookup | None:
        """The table for `levels`; None where two of them are too close for a table of this size."""
        middle, reach, scale = (levels[1:] + levels[:-1]) / 2, float(levels.abs().max()), 64.0
        while reach * scale <= cls.LARGEST:
            if len(_bins(middle, scale, reach).unique()) == len(middle):
                return cls(levels, middle, scale, reach)
            scale *= 2
        return None

    def nearest(self, x: Tensor) -> Tensor:
        """The nearest level to each entry."""
        flat = x.reshape(-1)
        at = _bins(flat, self.scale, self.reach)
        above = flat > self.middle.index_select(0, at)
        return self.levels.index_select(0, at.mul_(2).add_(above)).view(x.shape)


def _bins(x: Tensor, scale: float, reach: float) -> Tensor:
    return (x.clamp(-reach, reach) * scale + reach * scale).int()


@dataclass(frozen=True, eq=False)
class Coded:
    """Levels [..., out, in] and scales [..., out, groups], float32. The weight is their product, group by group."""

    levels: Tensor
    scales: Tensor

    def decoded(self) -> Tensor:
        """The weight that a reader decodes, float32 [..., out, in]."""
        groups: Tensor = self.levels.unflatten(-1, (self.scales.shape[-1], -1))
        return (groups * self.scales[..., None]).flatten(-2)


def round_to_nearest(weight: Tensor, grid: Grid, *, group: int) -> Coded:
    """The nearest levels of `weight` [..., out, in] with scales of amax / top per `group` weights of a row."""
    peak = weight.float().unflatten(-1, (-1, group)).abs().amax(-1)
    return with_scales(weight, grid.stored(peak / grid.top), grid)


def with_scales(weight: Tensor, scales: Tensor, grid: Grid) -> Coded:
    """The nearest levels of `weight` [..., out, in] for stored `scales` [..., out, groups]."""
    parts = weight.float().unflatten(-1, (scales.shape[-1], -1))
    return Coded(grid.nearest(parts / scales[..., None]).flatten(-2), scales)
