"""GPTQ on one matrix: codes and scales of least output error under a Hessian, for any grid of levels.

Column after column with error feedback (GPTQ, arXiv 2210.17323), then coordinate descent over scales and codes from
there, which only ever lowers the error (QuantEase, arXiv 2309.01885). Pure tensor functions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeconv.errors import InputError

_BLOCK = 64  # columns whose feedback is applied to the rest in one product
_RATIOS = tuple(0.4 + 0.025 * i for i in range(27))  # of the largest magnitude: clip below 1, spare a level above


@dataclass(frozen=True, eq=False)
class Grid:
    """The levels of a number format, ascending: a weight is level * scale. `top` is the level that the largest
    magnitude of a group takes in round-to-nearest, `dtype` what scales are stored in."""

    levels: Tensor
    top: float
    dtype: torch.dtype

    def nearest(self, x: Tensor) -> Tensor:
        """The nearest level of each entry of x, float32."""
        if len(self.levels) > 16 or float(self.levels[1] - self.levels[0]) == 1.0:  # integers
            return x.round().clamp_(float(self.levels[0]), float(self.levels[-1]))
        middle = (self.levels[1:] + self.levels[:-1]) / 2
        return self.levels[torch.bucketize(x, middle)]

    def stored(self, scales: Tensor) -> Tensor:
        """Scales as the file holds them, in float32; never zero."""
        tiny = torch.finfo(self.dtype).eps
        return scales.to(self.dtype).float().masked_fill(scales.abs() < 1e-30, tiny)


@dataclass(frozen=True, eq=False)
class Coded:
    """levels [out, in] and scales [out, groups], float32; the weight is their product, group by group."""

    levels: Tensor
    scales: Tensor

    def decoded(self) -> Tensor:
        """The weight that a reader gets, float32 [out, in]."""
        out, groups = self.scales.shape
        return (self.levels.view(out, groups, -1) * self.scales[..., None]).view(self.levels.shape)


def damped(hessian: Tensor, damping: float) -> Tensor:
    """Float64 `hessian` with `damping` times its mean diagonal added to the diagonal; the identity for a zero one.

    Raises InputError for NaN or infinite entries."""
    hessian = hessian.double()
    if not bool(torch.isfinite(hessian).all()):
        raise InputError(
            "the inputs of an expert hold NaN or infinite values", hint="The checkpoint is damaged, or it overflows."
        )
    mean = float(hessian.diagonal().mean())
    if mean <= 0:
        return torch.eye(len(hessian), dtype=torch.float64, device=hessian.device)
    return hessian / mean + damping * torch.eye(len(hessian), dtype=torch.float64, device=hessian.device)


def round_to_nearest(weight: Tensor, grid: Grid, *, group: int) -> Coded:
    """Every weight [out, in] to the nearest level of amax / top scales."""
    parts = weight.float().unflatten(1, (-1, group))
    scales = grid.stored(parts.abs().amax(-1) / grid.top)
    return Coded(grid.nearest(parts / scales[..., None]).flatten(1), scales)


def search_scales(weight: Tensor, importance: Tensor, grid: Grid, *, group: int) -> Tensor:
    """Scales [out, groups] of least squared error weighted by `importance` [in], over a grid of clip ratios."""
    parts = weight.float().unflatten(1, (-1, group))  # [out, groups, group]
    weights = importance.float().view(1, -1, group)
    peak = parts.abs().amax(-1) / grid.top
    best, least = grid.stored(peak), torch.full_like(peak, torch.inf)
    for ratio in (*_RATIOS, *(-r for r in _RATIOS)):
        scales = grid.stored(peak * ratio)
        levels = grid.nearest(parts / scales[..., None])
        # the fit of the scale to these levels, and what is left of the error with it
        along = (weights * levels * parts).sum(-1)
        energy = (weights * levels * levels).sum(-1)
        fitted = grid.stored(torch.where((energy > 0) & (along * ratio > 0), along / energy, scales))
        for trial in (scales, fitted):
            error = (weights * (parts - trial[..., None] * levels).square()).sum(-1)
            better = error < least
            best, least = torch.where(better, trial, best), torch.where(better, error, least)
    return best


def gptq(weight: Tensor, hessian: Tensor, grid: Grid, *, group: int, sweeps: int = 3, ordered: bool = True) -> Coded:
    """Codes of `weight` [out, in] that keep weight @ x, for inputs with second moment `hessian` [in, in] (damped).

    `ordered` takes the columns with the largest diagonal first (actorder); scales belong to groups of neighbouring
    columns all the same and are fixed before the first column, so that any reader of the format loads the result.
    `sweeps` rounds of coordinate descent follow, over the scales and then over the codes.
    """
    weight = weight.float()
    diagonal = hessian.diagonal()
    scales = search_scales(weight, diagonal, grid, group=group)
    order = torch.argsort(diagonal, descending=True) if ordered else torch.arange(len(diagonal))
    levels = _feedback(weight, hessian, scales.repeat_interleave(group, 1), grid, order)
    coded = Coded(levels, scales)
    for _ in range(sweeps):
        coded = _refit_scales(weight, hessian.float(), coded, grid, group=group)
        coded = _refit_levels(weight, hessian.float(), coded, grid, group=group, order=order)
    return coded


def loss(weight: Tensor, hessian: Tensor, coded: Coded) -> float:
    """tr((W - Q) H (W - Q)^T) in float64."""
    left = weight.double() - coded.decoded().double()
    return float(((left @ hessian.double()) * left).sum())


def retarget(weight: Tensor, gap: Tensor, hessian: Tensor) -> Tensor:
    """W + W gap H^-1: what reproduces W h from inputs h' = h - d. `gap` [in, in] sums d h'^T in units of `hessian`,
    the damped sum of h' h'^T (GPTAQ, arXiv 2504.02692, in closed form)."""
    solved = torch.linalg.solve(hessian.double(), gap.double().T).T  # gap H^-1, H symmetric
    return (weight.double() + weight.double() @ solved).float()


def _feedback(weight: Tensor, hessian: Tensor, scales: Tensor, grid: Grid, order: Tensor) -> Tensor:
    """One GPTQ pass with fixed scales [out, in]: the levels [out, in]."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    w, s = weight[:, order].T.contiguous(), scales[:, order].T.contiguous()  # [in, out]
    levels = torch.empty_like(w)
    for first in range(0, len(w), _BLOCK):
        last = min(first + _BLOCK, len(w))
        errors = torch.empty_like(w[first:last])
        for at in range(first, last):
            levels[at] = grid.nearest(w[at] / s[at])
            error = (w[at] - levels[at] * s[at]) / upper[at, at]
            w[at + 1 : last].addr_(upper[at, at + 1 : last], error, alpha=-1)
            errors[at - first] = error
        w[last:].addmm_(upper[first:last, last:].T, errors, alpha=-1)
    result = torch.empty_like(weight)
    result[:, order] = levels.T
    return result


def _refit_scales(weight: Tensor, hessian: Tensor, coded: Coded, grid: Grid, *, group: int) -> Coded:
    """Each group's scale to its minimum, the others fixed, group after group."""
    levels, scales = coded.levels, coded.scales.clone()
    slope = (weight - coded.decoded()) @ hessian  # [out, in], -1/2 of the gradient
    for g in range(scales.shape[1]):
        columns = slice(g * group, (g + 1) * group)
        part = levels[:, columns]
        reach = part @ hessian[columns]  # [out, in]
        energy = (reach[:, columns] * part).sum(1)
        along = (slope[:, columns] * part).sum(1)
        wanted = grid.stored(scales[:, g] + torch.where(energy > 0, along / energy, 0.0))
        step = wanted - scales[:, g]
        step = torch.where((step * step * energy < 2 * step * along) & (wanted * scales[:, g] > 0), step, 0.0)
        scales[:, g] += step
        slope.addcmul_(reach, step[:, None], value=-1)
    return Coded(levels, scales)


def _refit_levels(weight: Tensor, hessian: Tensor, coded: Coded, grid: Grid, *, group: int, order: Tensor) -> Coded:
    """Each column's levels to their minimum, the others fixed, column after column."""
    scales = coded.scales.repeat_interleave(group, 1)[:, order].T.contiguous()  # [in, out]
    levels = coded.levels[:, order].T.contiguous()
    h = hessian[order][:, order]
    slope = ((weight - coded.decoded()) @ hessian)[:, order].T.contiguous()
    for first in range(0, len(levels), _BLOCK):
        last = min(first + _BLOCK, len(levels))
        steps = torch.empty_like(levels[first:last])
        for at in range(first, last):
            s = scales[at]
            new = grid.nearest(levels[at] + slope[at] / (h[at, at] * s))
            step = (new - levels[at]) * s
            levels[at] = new
            slope[at:last].addr_(h[at, at:last], step, alpha=-1)
            steps[at - first] = step
        if last < len(levels):
            slope[last:].addmm_(h[first:last, last:].T, steps, alpha=-1)
    result = torch.empty_like(coded.levels)
    result[:, order] = levels.T
    return Coded(result, coded.scales)
