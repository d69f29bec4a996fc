"""Scales and codes of least squared error for many small blocks of weights at once, as ggml's block formats need them.

Arrays are [S, n, B]: B super-blocks of S blocks of n weights each, with the super-blocks along the last axis, so that
every step is a pass over long rows. An error may be weighted by the importance of each weight (the mean square of the
input that it multiplies). Codes are chosen for a few scales; the scale of the best of them is improved by least
squares, rounded as the format stores it, and the codes are chosen again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from moeconv.errors import InputError
from moeconv.plan.kernels.pack.common import check_finite

_TINY = float(np.finfo(np.float32).tiny)
_LARGEST, _NORMAL, _SMALLEST = 65504.0, 2.0**-14, 2.0**-24  # of float16: the largest, the least normal, the least
_LUT = 256  # half of the entries of a table of nearest levels


class Levels(Protocol):
    """The values that codes stand for, in units of the scale."""

    def nearest_(self, values: Tensor) -> Tensor:
        """Replace each value by the nearest level."""
        ...


@dataclass(frozen=True)
class Integers:
    """The integers from `low` to `high`."""

    low: int
    high: int

    def nearest_(self, values: Tensor) -> Tensor:
        return values.round_().clamp_(self.low, self.high)


class Table:
    """Levels of any whole values within -128..127, such as those of IQ4_NL."""

    def __init__(self, values: Sequence[int]) -> None:
        levels = torch.tensor(sorted(values), dtype=torch.float32)
        halves = torch.arange(-_LUT, _LUT).float().add_(0.5).div_(2)  # the middles of steps of a half
        codes = torch.bucketize(halves, (levels[1:] + levels[:-1]) / 2)
        self._levels, self._codes = levels[codes], codes.to(torch.uint8)

    def _at(self, values: Tensor) -> Tensor:
        return values.mul_(2).floor_().add_(_LUT).clamp_(0, 2 * _LUT - 1).to(torch.int32).view(-1)

    def nearest_(self, values: Tensor) -> Tensor:
        torch.index_select(self._levels, 0, self._at(values), out=values.view(-1))
        return values

    def codes(self, values: Tensor) -> Tensor:
        """The index of the nearest level of each value, uint8. The values are overwritten."""
        return self._codes.index_select(0, self._at(values)).view(values.shape)


class Weighted:
    """Values [S, n, B] with the importance of each (None: all count the same); and scratch memory."""

    def __init__(self, x: Tensor, importance: Tensor | None) -> None:
        self.x, self.w = x, importance
        self.wx = x if importance is None else x * importance
        self.codes, self.scratch = torch.empty_like(x), torch.empty_like(x)

    def over(self, scale: Tensor, levels: Levels, shift: Tensor | None = None) -> Tensor:
        """The nearest levels of (x + shift) / scale, which are kept in `codes`. `scale` and `shift` are [S, B]; codes
        of a scale of 0 are those of 0."""
        inverse = _inverse(scale)
        if shift is None:
            torch.mul(self.x, inverse[:, None], out=self.codes)
        else:
            torch.add(self.x, shift[:, None], out=self.codes).mul_(inverse[:, None])
        return levels.nearest_(self.codes)

    def products(self) -> tuple[Tensor, Tensor]:
        """The sums of codes * x and codes^2, weighted, each [S, B]."""
        qx = torch.mul(self.codes, self.wx, out=self.scratch).sum(1)
        squares = torch.mul(self.codes, self.codes, out=self.scratch)
        return qx, (squares if self.w is None else squares.mul_(self.w)).sum(1)

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """The sums of codes, codes^2 and codes * x, weighted, each [S, B]."""
        qx, qq = self.products()
        weighted = self.codes if self.w is None else torch.mul(self.codes, self.w, out=self.scratch)
        return weighted.sum(1), qq, qx

    @property
    def total(self) -> Tensor:
        """The sum of the importance over each block [S, B]."""
        if self.w is None:
            return torch.full((self.x.shape[0], self.x.shape[2]), float(self.x.shape[1]))
        return self.w.sum(1)


def symmetric(values: Weighted, levels: Levels, starts: Sequence[float], rounds: int = 1) -> tuple[Tensor, Tensor]:
    """(scale, sum of codes^2), each [S, B], of least squared error of scale * level. `starts` are the levels to which
    the value of largest magnitude is first mapped."""
    x = values.x
    high, low = x.amax(1), x.amin(1)
    check_finite(high - low)
    inverse = _inverse(torch.where(high > -low, high, low))
    scale, gain = torch.zeros_like(inverse), torch.zeros_like(inverse)
    curvature = torch.zeros_like(inverse)
    for start in starts:
        levels.nearest_(torch.mul(x, (inverse * start)[:, None], out=values.codes))
        _keep_better(scale, curvature, gain, *values.products())
    for _ in range(rounds):
        values.over(scale, levels)
        _keep_better(scale, curvature, gain, *values.products())
    return scale, curvature


def _keep_better(scale: Tensor, curvature: Tensor, gain: Tensor, qx: Tensor, qq: Tensor) -> None:
    """Take the least-squares scale of new codes where they explain more of the weights."""
    found = qx / qq.clamp(min=_TINY)
    reached = found * qx
    better = reached > gain
    scale.copy_(torch.where(better, found, scale))
    curvature.copy_(torch.where(better, qq, curvature))
    torch.maximum(gain, reached, out=gain)


@dataclass
class Lines:
    """Fits x = scale * code - offset, with both at least 0, and the sums of the codes that were fitted and of their
    squares. Each is [S, B]."""

    scale: Tensor
    offset: Tensor
    q: Tensor
    qq: Tensor


def affine(values: Weighted, top: int, starts: Sequence[float], rounds: int = 1, *, free: bool = False) -> Lines:
    """The fits of least squared error with codes 0..top. `starts` are the numbers of levels into which the range of a
    block is divided. `free`: the offset may be negative."""
    x, levels = values.x, Integers(0, top)
    low = x.amin(1)
    if not free:
        low.clamp_(max=0)
    width = x.amax(1).sub_(low)
    check_finite(width)
    total, sum_x = values.total, values.wx.sum(1)
    best = Lines(torch.zeros_like(width), -low, torch.zeros_like(width), torch.zeros_like(width))
    lost = torch.full_like(width, torch.inf)
    inverse = _inverse(width)
    for start in starts:
        values.over(_inverse(inverse * start), levels, -low)
        _keep_closer(best, lost, fit_line(values.sums(), sum_x, total, free=free), values, sum_x, total)
    for _ in range(rounds):
        values.over(best.scale, levels, best.offset)
        _keep_closer(best, lost, fit_line(values.sums(), sum_x, total, free=free), values, sum_x, total)
    return best


def fit_line(sums: tuple[Tensor, Tensor, Tensor], sum_x: Tensor, total: Tensor, *, free: bool = False) -> tuple[
    Lines, Tensor
]:  # fmt: skip
    """(the least-squares line for codes with these sums, the sum of codes * x)."""
    q, qq, qx = sums
    mean_q, mean_x = q / total, sum_x / total
    spread = (qq - q * mean_q).clamp_(min=0)
    scale = torch.where(spread > 1e-6 * qq, (qx - q * mean_x) / spread.clamp(min=_TINY), 0.0)
    offset = scale * mean_q - mean_x
    if not free:
        bare = (offset < 0) | (scale <= 0)
        scale = torch.where(bare, qx / qq.clamp(min=_TINY), scale).clamp_(min=0)
        offset = torch.where(bare, 0.0, offset)
    return Lines(scale, offset, q, qq), qx


def _keep_closer(
    best: Lines, lost: Tensor, found: tuple[Lines, Tensor], _values: Weighted, sum_x: Tensor, total: Tensor
) -> None:
    """Replace the fits by a line where its error, up to a common constant, is smaller."""
    line, qx = found
    s, o = line.scale, line.offset
    error = s * (s * line.qq - 2 * qx) + o * (o * total + 2 * sum_x) - 2 * s * o * line.q
    better = error < lost
    for old, new in zip((best.scale, best.offset, best.q, best.qq), (s, o, line.q, line.qq)):
        old.copy_(torch.where(better, new, old))
    torch.minimum(lost, error, out=lost)


def half(values: Tensor, name: str) -> Tensor:
    """`values` as float16 holds them, in float32. Magnitudes that float16 holds only in steps of 2^-24 are rounded away
    from 0, so that no code is clipped. Raises InputError for values that float16 cannot hold."""
    if float(values.abs().max()) > _LARGEST:
        raise InputError(f"the values are too large for {name}", hint="Use another scheme.")
    small = (values.abs() < _NORMAL) & (values != 0)
    stepped = torch.copysign((values.abs() / _SMALLEST).ceil_().mul_(_SMALLEST), values)
    return torch.where(small, stepped, values.half().float())


def _inverse(values: Tensor) -> Tensor:
    return torch.where(values.abs() > _TINY, values.reciprocal(), 0.0)
