"""Grids of levels (the values that codes stand for), and matrices whose values are on a grid, for any format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

E4M3_MAX = 448.0
_LEAST_POWER = 2.0**-96  # of a scale that is a power of two, so that its inverse is finite in all products
# ratios to the scale that maps the largest magnitude to `top`: below 1, large values are clipped; above 1, the outer
# levels are not used
RATIOS = tuple(0.4 + 0.025 * i for i in range(27))


def _powers(scales: Tensor) -> Tensor:
    """Powers of two: the one below a scale, or the one above it from 1.75 times that on (compressed-tensors)."""
    bits = scales.clamp(min=_LEAST_POWER).float().view(torch.int32)
    return ((bits + (1 << 21)) & -(1 << 23)).view(torch.float32)


# the values in float32 that scales have as stored in a dtype, where conversion alone does not give them
_STORED: Mapping[torch.dtype, Callable[[Tensor], Tensor]] = {
    torch.float8_e4m3fn: lambda s: s.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float(),
    torch.float8_e8m0fnu: _powers,
}


@dataclass(frozen=True, eq=False)
class Grid:
    """The levels of a number format, float32 ascending: a weight is level * scale. `top` is the level to which
    round-to-nearest maps the largest magnitude of a group. `dtype` is the dtype of the stored scales, float8_e8m0fnu
    for powers of two. `rounded` maps float32 values, which it may overwrite, to the nearest levels, where that is
    faster than a search. `ratios` are those of the scales to try. `whole`: a matrix has a scale of its own, which maps
    the largest scale of its groups to the largest number of `dtype` (NVFP4)."""

    levels: Tensor
    top: float
    dtype: torch.dtype
    rounded: Callable[[Tensor], Tensor] | None = None
    ratios: tuple[float, ...] = RATIOS
    whole: bool = False

    @cached_property
    def key(self) -> tuple[object, ...]:
        """A key that is equal for equal grids."""
        return tuple(self.levels.tolist()), self.top, self.dtype, self.whole

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
        if self.rounded is not None:
            return self.rounded(x)
        if self.integers:
            return x.round_().clamp_(*self.bounds)
        if x.device.type != "cpu" or self._lookup is None:
            return self._searched(x)
        return self._lookup.nearest(x)

    def stored(self, scales: Tensor) -> Tensor:
        """The scales as a file stores them, in float32; never zero."""
        store = _STORED.get(self.dtype)
        found = scales.to(self.dtype).float() if store is None else store(scales)
        return found.masked_fill((scales.abs() < 1e-30) | (found == 0), torch.finfo(self.dtype).eps)

    def unit(self, weight: Tensor, peak: Tensor | None = None) -> Tensor | None:
        """The scale of each whole matrix of `weight` [..., out, in], float32 [..., out, 1]; None where a matrix has
        none. `peak` [..., 1, 1] is the largest magnitude that it is for, None for that of the matrix. Scales of groups
        are stored relative to it, so that the other functions take `weight / unit`."""
        if not self.whole:
            return None
        largest = weight.abs().amax((-2, -1), keepdim=True) if peak is None else peak
        unit = (largest.float() / (self.top * E4M3_MAX)).clamp(min=torch.finfo(torch.float32).tiny)
        return unit.masked_fill(largest == 0, 1.0).expand(*weight.shape[:-1], 1)

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
    """Levels [..., out, in], scales [..., out, groups] and, on a grid of which a whole matrix has a scale, that scale
    as `unit` [..., out, 1]; float32. The weight is their product, group by group."""

    levels: Tensor
    scales: Tensor
    unit: Tensor | None = None

    def decoded(self) -> Tensor:
        """The weight that a reader decodes, float32 [..., out, in]."""
        groups: Tensor = self.levels.unflatten(-1, (self.scales.shape[-1], -1))
        scales = self.scales if self.unit is None else self.scales * self.unit
        return (groups * scales[..., None]).flatten(-2)


def divided(weight: Tensor, unit: Tensor | None) -> Tensor:
    """`weight` in units of the scale of its matrix."""
    return weight if unit is None else weight / unit


def nearest_scales(weight: Tensor, grid: Grid, *, group: int) -> Tensor:
    """The scales amax / top of each `group` weights of a row, for `weight` [..., out, in] in units of its matrix."""
    peak = weight.float().unflatten(-1, (-1, group)).abs().amax(-1)
    return grid.stored(peak / grid.top)


def round_to_nearest(weight: Tensor, grid: Grid, *, group: int) -> Coded:
    """The nearest levels of `weight` [..., out, in] with scales of amax / top per `group` weights of a row."""
    unit = grid.unit(weight)
    return with_scales(weight, nearest_scales(divided(weight, unit), grid, group=group), grid, unit)


def with_scales(weight: Tensor, scales: Tensor, grid: Grid, unit: Tensor | None = None) -> Coded:
    """The nearest levels of `weight` [..., out, in] for stored `scales` [..., out, groups], which are in units of
    `unit`."""
    parts = divided(weight, unit).float().unflatten(-1, (scales.shape[-1], -1))
    return Coded(grid.nearest(parts / scales[..., None]).flatten(-2), scales, unit)
