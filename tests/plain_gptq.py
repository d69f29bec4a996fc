"""GPTQ of one matrix, a column at a time, all of it in float64: what the batched form is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RATIOS = [0.4 + 0.025 * i for i in range(27)]


class Plain:
    """`levels` ascending; `top`, `dtype` and `ratios` as in `moeconv.plan.kernels.pack.levels.Grid`."""

    def __init__(self, levels: Tensor, top: float, dtype: torch.dtype, ratios: Sequence[float] = RATIOS) -> None:
        self.levels, self.top, self.dtype, self.ratios = levels.double(), top, dtype, ratios
        self.integers = bool((levels.diff() == 1).all())

    def nearest(self, x: Tensor) -> Tensor:
        if self.integers:  # halves go to the even level
            return x.round().clamp(self.levels[0], self.levels[-1])
        return self.levels[torch.bucketize(x, (self.levels[1:] + self.levels[:-1]) / 2)]

    def stored(self, scales: Tensor) -> Tensor:
        if self.dtype == torch.float8_e8m0fnu:  # powers of two, up from 1.75 times the one below
            power = torch.exp2(scales.clamp(min=1e-28).log2().floor())
            return torch.where(scales >= 1.75 * power, 2 * power, power)
        if self.dtype == torch.float8_e4m3fn:
            scales = scales.clamp(max=448)
            return scales.to(self.dtype).double().masked_fill(scales < 2**-10, 0.125)
        return scales.to(self.dtype).double().masked_fill(scales.abs() < 1e-30, torch.finfo(self.dtype).eps)


def search(weight: Tensor, importance: Tensor, grid: Plain, group: int) -> Tensor:
    parts, weights = weight.unflatten(1, (-1, group)), importance.view(1, -1, group)
    peak = parts.abs().amax(-1) / grid.top
    best, least = grid.stored(peak), torch.full_like(peak, torch.inf)
    for ratio in (*grid.ratios, *(-r for r in grid.ratios)):
        scales = grid.stored(peak * ratio)
        levels = grid.nearest(parts / scales[..., None])
        along, energy = (weights * levels * parts).sum(-1), (weights * levels * levels).sum(-1)
        fitted = grid.stored(torch.where((energy > 0) & (along * ratio > 0), along / energy, scales))
        for trial in (scales, fitted):
            error = (weights * (parts - trial[..., None] * levels).square()).sum(-1)
            better = error < least * (1 - 1e-9)
            best, least = torch.where(better, trial, best), torch.where(better, error, least)
    return best


def gptq(weight: Tensor, hessian: Tensor, grid: Plain, *, group: int, sweeps: int = 3) -> tuple[Tensor, Tensor]:
    """(levels [out, in], scales [out, groups]) of weight [out, in]."""
    weight = weight.double()
    scales = search(weight, hessian.diagonal(), grid, group)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist()
    inverse = torch.linalg.inv(hessian[order][:, order])
    upper = torch.linalg.cholesky(inverse, upper=True)
    left, levels = weight.clone(), torch.zeros_like(weight)
    for i, column in enumerate(order):
        s = scales[:, column // group]
        levels[:, column] = grid.nearest(left[:, column] / s)
        error = (left[:, column] - levels[:, column] * s) / upper[i, i]
        left[:, order[i + 1 :]] -= error[:, None] * upper[i, i + 1 :]
    for _ in range(sweeps):
        for g in range(scales.shape[1]):
            part = torch.zeros_like(weight)
            part[:, g * group : (g + 1) * group] = levels[:, g * group : (g + 1) * group]
            slope = (weight - decoded(levels, scales)) @ hessian
            energy, along = ((part @ hessian) * part).sum(1), (slope * part).sum(1)
            wanted = grid.stored(scales[:, g] + torch.where(energy > 0, along / energy, 0.0))
            step = wanted - scales[:, g]
            taken = (step * step * energy < 2 * step * along) & (wanted * scales[:, g] > 0)
            scales[:, g] += torch.where(taken, step, 0.0)
        for column in order:
            slope = ((weight - decoded(levels, scales)) @ hessian)[:, column]
            moved = levels[:, column] + slope / (hessian[column, column] * scales[:, column // group])
            levels[:, column] = grid.nearest(moved)
    return levels, scales


def decoded(levels: Tensor, scales: Tensor) -> Tensor:
    return (levels.unflatten(1, (scales.shape[1], -1)) * scales[..., None]).flatten(1)
