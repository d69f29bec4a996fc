"""The grids of the layouts of compressed-tensors whose activations or codes are floats, or are quantized by row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moeconv.plan.kernels.pack.eightbit import float8_parts, int8_parts, mxfp8_parts
from moeconv.plan.kernels.pack.float_grids import float8_grid, int8_grid, mxfp4_grid, mxfp8_grid, nvfp4_grid
from moeconv.plan.kernels.pack.fp4 import NVFP4_GROUP, mxfp4_parts, nvfp4_parts
from moeconv.plan.kernels.pack.levels import Coded, Grid
from moeconv.plan.kernels.pack.microscale import MX_GROUP
from moeconv.plan.kernels.stored import TORCH_DTYPES
from moeconv.plan.plan import Item
from moeconv.quantize.gptq.grids import CodeGrid


def _by_row(grid: Callable[[torch.dtype], Grid], parts: Callable[[Coded], dict[str, Tensor]]) -> CodeGrid:
    """One scale per row, in the dtype that the item stores."""

    def of(item: Item) -> tuple[Grid, int]:
        scale = next(s for s, part in zip(item.outputs, item.params["parts"]) if part == "weight_scale")
        return grid(TORCH_DTYPES[scale.dtype]), item.inputs[0].shape[1]

    return CodeGrid(of, lambda _, coded: parts(coded))


def _in_groups(grid: Callable[[], Grid], group: int, parts: Callable[[Coded], dict[str, Tensor]]) -> CodeGrid:
    return CodeGrid(lambda _: (grid(), group), lambda _, coded: parts(coded))


FLOAT8 = _by_row(float8_grid, float8_parts)
INT8_ROWS = _by_row(int8_grid, int8_parts)
NVFP4 = _in_groups(nvfp4_grid, NVFP4_GROUP, nvfp4_parts)
MXFP4 = _in_groups(mxfp4_grid, MX_GROUP, mxfp4_parts)
MXFP8 = _in_groups(mxfp8_grid, MX_GROUP, mxfp8_parts)
