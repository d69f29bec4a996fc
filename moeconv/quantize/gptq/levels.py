"""Grids of levels, and matrices that lie on one: what a code may stand for, whatever the format."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Grid:
    """The levels of a number format, ascending: a weight is level * scale. `top` is the level that the largest
    magnitude of a group takes in round-to-nearest, `dtype` what scales are stored in."""

    levels: Tensor
    top: float
    dtype: torch.dtype

    @cached_property
    def key(self) -> tuple[object, ...]:
        """Equal for grids that are the same."""
        return tuple(self.levels.tolist()), self.top, self.dtype

    @cached_property
    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest level."""
        return float(self.levels[0]), float(self.levels[-1])

    @cached_property
    def integers(self) -> bool:
        """The levels are all integers between the bounds."""
        return bool((self.levels.diff() == 1).all()) and self.bounds[0].is_integer()

    @cached_property
    def symmetric(self) -> bool:
        """Every level has its negative: a scale of the other sign gives nothing new."""
        return bool(torch.equal(self.levels, -self.levels.flip(0)))

    def nearest(self, x: Tensor) -> Tensor:
        """The nearest level of each entry of x, float32; x may be overwritten."""
        if self.integers:
            return x.round_().clamp_(*self.bounds)
        if x.device.type != "cpu" or self._lookup is None:
            return self._searched(x)
        return self._lookup.nearest(x)

    def stored(self, scales: Tensor) -> Tensor:
        """Scales as the file holds them, in float32; never zero."""
        tiny = torch.finfo(self.dtype).eps
        return scales.to(self.dtype).float().masked_fill(scales.abs() < 1e-30, tiny)

    def _searched(self, x: Tensor) -> Tensor:
        levels = self.levels.to(x.device)
        return levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]

    @cached_property
    def _lookup(self) -> _Lookup | None:
        return _Lookup.of(self.levels)


class _Lookup:
    """The nearest of uneven levels by a table of bins, each with one midpoint at most: on the CPU ten times faster than
    a search. The bin of a value ascends with the value, so that the result is that of the search for every float."""

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
        """The table of `levels`; None where two of them lie too close for one."""
        middle, reach, scale = (levels[1:] + levels[:-1]) / 2, float(levels.abs().max()), 64.0
        while reach * scale <= cls.LARGEST:
            if len(_bins(middle, scale, reach).unique()) == len(middle):
                return cls(levels, middle, scale, reach)
            scale *= 2
        return None

    def nearest(self, x: Tensor) -> Tensor:
        """The nearest level of each entry."""
        flat = x.reshape(-1)
        at = _bins(flat, self.scale, self.reach)
        above = flat > self.middle.index_select(0, at)
        return self.levels.index_select(0, at.mul_(2).add_(above)).view(x.shape)


def _bins(x: Tensor, scale: float, reach: float) -> Tensor:
    return (x.clamp(-reach, reach) * scale + reach * scale).int()


@dataclass(frozen=True, eq=False)
class Coded:
    """levels [..., out, in] and scales [..., out, groups], float32; the weight is their product, group by group."""

    levels: Tensor
    scales: Tensor

    def decoded(self) -> Tensor:
        """The weight that a reader gets, float32 [..., out, in]."""
        return (self.levels.unflatten(-1, (self.scales.shape[-1], -1)) * self.scales[..., None]).flatten(-2)


def round_to_nearest(weight: Tensor, grid: Grid, *, group: int) -> Coded:
    """Every weight [..., out, in] to the nearest level of amax / top scales."""
    parts = weight.float().unflatten(-1, (-1, group))
    scales = grid.stored(parts.abs().amax(-1) / grid.top)
    return Coded(grid.nearest(parts / scales[..., None]).flatten(-2), scales)
