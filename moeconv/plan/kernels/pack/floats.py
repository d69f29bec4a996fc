"""Weights that others stored in 8-bit and 4-bit floats: how their codes and scales become numbers again.

Bit by bit what transformers computes: FP8 with a scale a block, row or tensor, MXFP4 (OCP Microscaling, 2023).
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128  # rows and columns of a block in DeepSeek's FP8
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def unpack_fp8_blocks(codes: Tensor, scales: Tensor) -> Tensor:
    """float32 [out, in] from FP8 codes [out, in] and a scale for every block of them, [out blocks, in blocks].

    Blocks are 128 x 128, cut off at the edges (DeepSeek-V3, arXiv 2412.19437, section 3.3), or whatever divides the
    weight evenly. Raises ValueError for scales that are neither.
    """
    sizes = []
    for length, count in zip(codes.shape, scales.shape):
        size = BLOCK if -(-length // BLOCK) == count else length // max(1, count)
        if -(-length // max(1, size)) != count:
            raise ValueError(f"{count} scales for {length} rows or columns")
        sizes.append(size)
    rows, columns = sizes
    wide = scales.float().repeat_interleave(columns, 1)[:, : codes.shape[1]]
    out = codes.float()
    for i, scale in enumerate(wide):
        out[i * rows : (i + 1) * rows] *= scale
    return out


def unpack_fp8(codes: Tensor, scale: Tensor) -> Tensor:
    """The weight in the scale's dtype, from FP8 codes [out, in] and a scale of one number or [out, 1]."""
    return codes.to(scale.dtype) * (scale if scale.numel() > 1 else scale.reshape(()))


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
