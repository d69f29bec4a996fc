"""Weights that others stored in 8-bit and 4-bit floats: how their codes and scales become numbers again.

Bit by bit what transformers computes: FP8 with a scale a block, row or tensor, MXFP4 (OCP Microscaling, 2023).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moeconv.plan.kernels.pack.common import row_blocks

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
Grid = Sequence[int | None]  # rows and columns of weights that share a scale, None for all of that axis


def times(values: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """`values` [..., rows, columns] times the scale of each block of `grid`, in place. Blocks are cut off at the edges
    (DeepSeek-V3, arXiv 2412.19437, section 3.3); scales are [..., row blocks, column blocks], or one number.

    Raises ValueError for as many scales as there are no blocks."""
    if scales.numel() == 1:
        return values.mul_(scales.reshape(()))
    rows, columns = values.shape[-2:]
    high, wide = grid[0] or rows, grid[1] or columns
    wanted = (*values.shape[:-2], -(-rows // high), -(-columns // wide))
    if tuple(scales.shape) != wanted:
        raise ValueError(f"scales of shape {list(scales.shape)} for blocks {list(wanted)}")
    for one, each in zip(values.reshape(-1, rows, columns), scales.reshape(-1, *wanted[-2:])):
        across = each.repeat_interleave(wide, 1)[:, :columns]
        for i, scale in enumerate(across):
            one[i * high : (i + 1) * high] *= scale
    return values


def spread(scales: Tensor, grid: Grid, shape: Sequence[int]) -> Tensor:
    """What belongs to each block of a weight of this shape, for each of its numbers: `scales` as in `times`."""
    return times(torch.ones(tuple(shape), dtype=scales.dtype), scales, grid)


def unpack_nvfp4(packed: Tensor, scales: Tensor, whole: Tensor) -> Tensor:
    """bfloat16 [out, in] from E2M1 codes [out, in / 2] (two to a byte, the low nibble first), FP8 scales [out, groups]
    and one number that divides them, as compressed-tensors computes it: the scales in bfloat16, the rest in float32."""
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    values = torch.tensor(_E2M1)
    out = torch.empty(rows, columns, dtype=torch.bfloat16)
    finest = scales.bfloat16().float() / whole.reshape(()).float()
    for start, stop in row_blocks(rows, columns):
        codes = packed[start:stop]
        both = torch.stack([values[(codes & 15).int()], values[(codes >> 4).int()]], -1)
        groups = both.view(stop - start, scales.shape[1], -1)
        out[start:stop] = groups.mul_(finest[start:stop, :, None]).view(stop - start, columns)
    return out


def unpack_mxfp4_rows(packed: Tensor, exponents: Tensor) -> Tensor:
    """bfloat16 [out, in] from E2M1 codes [out, in / 2] and exponents [out, in / 32] (base 2, less 127); exact."""
    exponents = exponents.view(torch.uint8)
    groups = exponents.shape[1]
    blocks = packed.reshape(1, packed.shape[0], groups, packed.shape[1] // groups)
    return unpack_mxfp4(blocks, exponents.reshape(1, -1, groups))[0].T.contiguous()


def unpack_mxfp4(blocks: Tensor, exponents: Tensor) -> Tensor:
    """bfloat16 [E, in, out] from codes [E, out, in / 32, 16] (two to a byte, the low nibble first) and their exponents
    [E, out, in / 32] (base 2, less 127); exact, since a code has two significant bits."""
    if blocks.shape[:-1] != exponents.shape:
        raise ValueError(f"exponents {list(exponents.shape)} for blocks {list(blocks.shape)}")
    values = torch.tensor(_E2M1, dtype=torch.bfloat16)
    *front, groups, width = blocks.shape
    out = torch.empty(*front, groups, width, 2, dtype=torch.bfloat16)
    for one, codes, exponent in zip(out, blocks, exponents):  # an expert at a time bounds the index tensors
        shift = (exponent.to(torch.int32) - 127).unsqueeze(-1)
        torch.ldexp(values[(codes & 15).int()], shift, out=one[..., 0])
        torch.ldexp(values[(codes >> 4).int()], shift, out=one[..., 1])
    return out.reshape(*front, groups * width * 2).transpose(1, 2).contiguous()
