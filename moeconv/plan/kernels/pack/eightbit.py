"""8-bit floats and integers of compressed-tensors, one byte per weight: FP8 (E4M3) per row, per block or in the groups
of OCP Microscaling (2023), and INT8 per row.

The quotient of weight and scale is rounded to the dtype of the weight before it is rounded to a code, as in
compressed-tensors, so that the bytes are those of llm-compressor. With `fit`, scales are those of least squared error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeconv.errors import UsageError
from moeconv.plan.kernels.pack.common import SCRATCH, check_matrix, row_blocks
from moeconv.plan.kernels.pack.float_grids import float8_grid, int8_grid, mxfp8_grid
from moeconv.plan.kernels.pack.levels import E4M3_MAX, Coded
from moeconv.plan.kernels.pack.microscale import MX_GROUP, exponents_from, exponents_of, powers_below
from moeconv.plan.kernels.pack.peaks import column_peaks, peaks, usable
from moeconv.plan.kernels.pack.roundings import to_float8
from moeconv.plan.kernels.pack.scales import fitted


def pack_float8(weight: Tensor, *, fit: bool = False) -> dict[str, Tensor]:
    """FP8 codes `weight` float8_e4m3fn [out, in] with one scale per row, `weight_scale` [out, 1] in the dtype of the
    weight [out, in]. Raises UsageError for a weight that is not a float matrix, InputError for NaN or infinity in
    it."""
    check_matrix(weight)
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(rows, 1, dtype=weight.dtype)
    if fit:
        scales.copy_(fitted(weight, float8_grid(weight.dtype), group=columns))
    for start, stop in row_blocks(rows, columns):
        x, each = weight[start:stop], scales[start:stop]
        if not fit:
            each.copy_(usable(peaks(x, group=columns) / E4M3_MAX))
        quotients = torch.div(x, each, out=SCRATCH("values", x.shape, x.dtype))
        to_float8(quotients, each, codes[start:stop], cut=fit)
    return {"weight": codes, "weight_scale": scales}


def pack_float8_blocks(
    weight: Tensor, *, block: int, dtype: torch.dtype | None = None, fit: bool = False
) -> dict[str, Tensor]:
    """FP8 codes `weight` float8_e4m3fn [out, in] with one scale per `block` x `block` weights, `weight_scale` [out /
    block, in / block]. Scales and quotients are computed in `dtype` (None: that of the weight). Raises as `pack_float8`
    does, and UsageError where `block` does not divide both sizes."""
    check_matrix(weight)
    rows, columns = weight.shape
    if rows % block or columns % block:
        raise UsageError(f"blocks of {block} do not divide a matrix of {rows} x {columns}", hint="Pass another block.")
    dtype = dtype or weight.dtype
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(rows // block, columns // block, dtype=dtype)
    for at, each in enumerate(scales):
        x = weight[at * block : (at + 1) * block].to(dtype)
        if fit:
            blocks = x.view(block, -1, block).transpose(0, 1).reshape(len(each), block * block)
            each.copy_(fitted(blocks, float8_grid(dtype), group=block * block)[:, 0])
        else:
            each.copy_(usable(peaks(column_peaks(x)[None], group=block)[0] / E4M3_MAX))
        by_block = x.view(block, -1, block)
        quotients = torch.div(by_block, each[None, :, None], out=SCRATCH("values", by_block.shape, dtype))
        to_float8(quotients.view(block, columns), each, codes[at * block : (at + 1) * block], cut=fit)
    return {"weight": codes, "weight_scale": scales}


def pack_int8_rows(weight: Tensor, *, fit: bool = False) -> dict[str, Tensor]:
    """Levels `weight` int8 [out, in] in [-128, 127] with one scale per row, max |w| / 127.5: `weight_scale` [out, 1] in
    the dtype of the weight. Raises as `pack_float8` does."""
    check_matrix(weight)
    rows, columns = weight.shape
    levels = torch.empty(rows, columns, dtype=torch.int8)
    scales = torch.empty(rows, 1, dtype=weight.dtype)
    if fit:
        scales.copy_(fitted(weight, int8_grid(weight.dtype), group=columns))
    for start, stop in row_blocks(rows, columns):
        x, each = weight[start:stop], scales[start:stop]
        if not fit:
            each.copy_(usable(peaks(x, group=columns) / 127.5))
        quotients = torch.div(x, each, out=SCRATCH("values", x.shape, x.dtype))
        levels[start:stop].copy_(quotients.clamp_(-128, 127).round_())
    return {"weight": levels, "weight_scale": scales}


def pack_mxfp8(weight: Tensor, *, fit: bool = False) -> dict[str, Tensor]:
    """MXFP8: codes `weight` float8_e4m3fn [out, in], and exponents `weight_scale` uint8 [out, in / 32] (base 2, with a
    bias of 127). Raises as `pack_float8` does."""
    check_matrix(weight)
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    exponents = torch.empty(rows, columns // MX_GROUP, dtype=torch.uint8)
    if fit:
        exponents = exponents_from(fitted(weight, mxfp8_grid(), group=MX_GROUP))
    for start, stop in row_blocks(rows, columns):
        x, each = weight[start:stop], exponents[start:stop]
        if not fit:
            each.copy_(exponents_of(peaks(x, group=MX_GROUP), below=8))
        quotients = SCRATCH("values", x.shape).copy_(x)
        quotients.view(stop - start, -1, MX_GROUP).mul_(powers_below(each)[..., None])
        if fit:
            quotients.clamp_(-E4M3_MAX, E4M3_MAX)
        codes[start:stop].copy_(quotients)  # without `fit`, at most 448: the exponent is that of 1.75 * 2^8
    return {"weight": codes, "weight_scale": exponents}


def float8_parts(coded: Coded) -> dict[str, Tensor]:
    """The tensors of `pack_float8` for chosen codes."""
    return {"weight": coded.levels.to(torch.float8_e4m3fn), "weight_scale": coded.scales}


def int8_parts(coded: Coded) -> dict[str, Tensor]:
    """The tensors of `pack_int8_rows` for chosen codes."""
    return {"weight": coded.levels.to(torch.int8), "weight_scale": coded.scales}


def mxfp8_parts(coded: Coded) -> dict[str, Tensor]:
    """The tensors of `pack_mxfp8` for chosen codes."""
    return {"weight": coded.levels.to(torch.float8_e4m3fn), "weight_scale": exponents_from(coded.scales)}
