"""The search for scales of least weighted error over clip ratios, for all groups of a batch of matrices at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from moeconv.plan.kernels.pack.common import check_finite, row_blocks
from moeconv.plan.kernels.pack.levels import Grid, divided

_BLOCK = {"cpu": 1 << 18}  # values per pass, which stay in the cache; calls cost as much as the work at 1 << 16
_LARGE_BLOCK = 1 << 26


def search_scales(weight: Tensor, importance: Tensor, grid: Grid, *, group: int) -> Tensor:
    """Scales [E, out, groups] of least squared error of `weight` [E, out, in], in units of its matrix, weighted by
    `importance` [E, in]."""
    experts, out, width = weight.shape
    parts = weight.unflatten(-1, (-1, group)).transpose(1, 2).reshape(-1, out, group)  # [E * groups, out, group]
    roots = importance.float().sqrt().reshape(-1, 1, group)
    found = torch.empty(parts.shape[:2], device=weight.device)
    for some, rows in _blocks(parts):
        found[some, rows] = _search(parts[some, rows].float(), roots[some], grid)
    return found.view(experts, width // group, out).transpose(1, 2).contiguous()


def fitted(weight: Tensor, grid: Grid, *, group: int, peak: Tensor | None = None) -> Tensor:
    """The scales [out, groups] of least squared error of `weight` [out, in], as stored. `peak` is the largest magnitude
    for which the scale of the matrix is, on a grid that has one. Raises InputError for NaN or infinity in the weight.

    Scales that clip the largest weights are not tried: they lower the error of the weights, but raise that of a layer's
    output where large weights are multiplied by large activations."""
    rows, columns = weight.shape
    grid = replace(grid, ratios=tuple(ratio for ratio in grid.ratios if ratio >= 1))
    unit = None if peak is None else grid.unit(weight[:1], peak.reshape(1, 1))
    found = torch.empty(rows, columns // group)
    for start, stop in row_blocks(rows, columns):
        wide = divided(weight[start:stop].float(), unit)
        check_finite(wide.view(-1, group).abs().amax(-1))
        found[start:stop] = search_scales(wide[None], torch.ones(1, columns), grid, group=group)[0]
    return found


def _blocks(parts: Tensor) -> Iterator[tuple[slice, slice]]:
    count, out, group = parts.shape
    block = _BLOCK.get(parts.device.type, _LARGE_BLOCK)
    rows = max(1, min(out, block // group))
    some = max(1, block // (rows * group))
    for first in range(0, count, some):
        for start in range(0, out, rows):
            yield slice(first, first + some), slice(start, start + rows)


def _search(parts: Tensor, roots: Tensor, grid: Grid) -> Tensor:
    """The scales [n, rows] of least error for `parts` [n, rows, group]. `roots` [n, 1, group] are the square roots of
    the weights of the squared errors."""
    peak = parts.abs().amax(-1) / grid.top
    usual = grid.stored(peak), torch.full_like(peak, torch.inf)
    best = {1.0: usual, -1.0: usual}  # by the sign of the scale: (magnitude of the scale, error)
    quotient, room, rest = (torch.empty_like(parts) for _ in range(3))
    rooted = parts * roots
    for ratio in grid.ratios:
        scales = grid.stored(peak * ratio)
        torch.div(parts, scales[..., None], out=quotient)
        for sign, levels in _levels(quotient, grid, room):
            levels.mul_(roots)
            torch.addcmul(rooted, levels, scales[..., None], value=-1, out=rest)
            error, energy = _squares(rest), _squares(levels)
            slope = levels.mul_(rest).sum(-1)
            # the scale that fits these levels best, and the error with it
            fits = (energy > 0) & (slope + scales * energy > 0)
            fitted = grid.stored(torch.where(fits, scales + slope / energy, scales))
            step = fitted - scales
            one = _lesser((scales, error), (fitted, error + step * (step * energy - 2 * slope)))
            best[sign] = _lesser(best[sign], one)
    (scales, error), (mirrored, other) = best[1.0], best[-1.0]
    # both signs often give the same levels; the errors then differ only by rounding
    return torch.where(other < error * (1 - 1e-6), -mirrored, scales)


def _lesser(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Of two (scales, errors), element by element the one with the smaller error; `one` if they are equal."""
    better = other[1] < one[1]
    return torch.where(better, other[0], one[0]), torch.where(better, other[1], one[1])


def _squares(x: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return norms.square_()


def _levels(quotient: Tensor, grid: Grid, room: Tensor) -> Iterator[tuple[float, Tensor]]:
    """(1, the nearest levels). If a negative scale can give others, then also (-1, the nearest levels for that scale,
    negated). `quotient` and `room` are overwritten."""
    low, high = grid.bounds
    if grid.integers:
        quotient.round_()
        yield 1.0, torch.clamp(quotient, low, high, out=room)
        if not grid.symmetric:
            yield -1.0, torch.clamp(quotient, -high, -low, out=room)
        return
    yield 1.0, grid.nearest(quotient)
    if not grid.symmetric:
        yield (
            -1.0,
            grid.nearest(quotient.neg_()).neg_(),
        )  # a value in the middle of two levels is rounded to the other one
