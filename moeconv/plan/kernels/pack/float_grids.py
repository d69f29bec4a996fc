"""The grids of the number formats of compressed-tensors whose codes are floats, and that of INT8 by row."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from moeconv.plan.kernels.pack.levels import E4M3_MAX, Grid

E2M1_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# a float code has the same relative error with every scale, so that only the place of the levels within a power of two
# can be better; clipping never is
_WITHIN_A_POWER = tuple(2 ** (i / 8) for i in range(8))
# the largest magnitude can be the code 4, below which the codes are closer to each other (arXiv 2512.02010)
_FOUR_OVER_SIX = (1.0, 0.85, 0.925, 1.125, 1.25, 1.375, 1.5)


@lru_cache(maxsize=4)
def float8_grid(dtype: torch.dtype) -> Grid:
    """FP8 (E4M3) codes with scales in `dtype`."""
    return Grid(_e4m3(), E4M3_MAX, dtype, rounded=_to_e4m3, ratios=_WITHIN_A_POWER)


@lru_cache(maxsize=4)
def int8_grid(dtype: torch.dtype) -> Grid:
    """INT8 levels with scales in `dtype`."""
    return Grid(torch.arange(-128.0, 128.0), 127.5, dtype)


@lru_cache(maxsize=1)
def nvfp4_grid() -> Grid:
    """E2M1 codes with FP8 scales, relative to the scale of the matrix."""
    return Grid(_e2m1(), 6.0, torch.float8_e4m3fn, ratios=_FOUR_OVER_SIX, whole=True)


@lru_cache(maxsize=1)
def mxfp4_grid() -> Grid:
    """E2M1 codes with powers of two as scales: the one that OCP Microscaling has, and those beside it."""
    return Grid(_e2m1(), 4.0, torch.float8_e8m0fnu, ratios=(1.0, 0.5, 2.0))


@lru_cache(maxsize=1)
def mxfp8_grid() -> Grid:
    """FP8 codes with powers of two as scales."""
    return Grid(_e4m3(), 256.0, torch.float8_e8m0fnu, rounded=_to_e4m3, ratios=(1.0, 2.0))


def _to_e4m3(x: Tensor) -> Tensor:
    return x.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()


def _e4m3() -> Tensor:
    values = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).float()
    levels: Tensor = values[values.isfinite()].unique()
    return levels


def _e2m1() -> Tensor:
    return torch.tensor([*(-x for x in reversed(E2M1_LEVELS)), *E2M1_LEVELS[1:]])
