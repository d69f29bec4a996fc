"""Decoding of weights that other tools have stored in 8-bit and 4-bit floats.

The results are equal, bit by bit, to those of transformers: FP8 with one scale per block, row or tensor, and MXFP4
and MXFP8 (OCP Microscaling, 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from moeconv.plan.kernels.pack.common import WORDS, look_up, pairs_of, row_blocks

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
Grid = Sequence[int | None]  # rows and columns of weights that share a scale, None for all of that axis


def times(values: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """`values` [..., rows, columns] multiplied, in place, by the scale of each block of `grid`. The blocks at the edges
    are smaller where the sizes do not divide (DeepSeek-V3, arXiv 2412.19437, section 3.3). `scales` are [..., row
    blocks, column blocks], or one number.

    Raises ValueError where the shape of the scales does not fit the blocks."""
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
    """The scale of every element of a weight of this shape; `scales` and `grid` are as in `times`."""
    return times(torch.ones(tuple(shape), dtype=scales.dtype), scales, grid)


def widened(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """FP8 `codes` converted to `dtype`, equal to the result of `Tensor.to`. On the CPU it takes a quarter of that time,
    because two codes are looked up as one word."""
    if codes.device.type != "cpu" or codes.numel() % 2 or dtype not in WORDS or not codes.is_contiguous():
        return codes.to(dtype)
    out = torch.empty(codes.shape, dtype=dtype)
    look_up(codes.view(torch.uint8).reshape(-1).view(torch.uint16), _pairs_of_codes(codes.dtype, dtype), out)
    return out


@lru_cache(maxsize=8)
def _pairs_of_codes(codes: torch.dtype, dtype: torch.dtype) -> Tensor:
    return pairs_of(torch.arange(256, dtype=torch.int32).to(torch.uint8).view(codes).to(dtype))


@lru_cache(maxsize=4)
def _pairs_of_nibbles(dtype: torch.dtype) -> Tensor:
    return pairs_of(torch.tensor(E2M1, dtype=dtype))


def unpack_nvfp4(packed: Tensor, scales: Tensor, whole: Tensor) -> Tensor:
    """bfloat16 [out, in] from E2M1 codes [out, in / 2] (two per byte, the low nibble first), FP8 scales [out, groups],
    and one number by which the scales are divided. The scales are computed in bfloat16 and the rest in float32, as in
    compressed-tensors."""
    return _e2m1(packed, scales.bfloat16().float() / whole.reshape(()).float())


def unpack_modelopt(packed: Tensor, scales: Tensor, second: Tensor) -> Tensor:
    """bfloat16 [out, in] from E2M1 codes and FP8 scales as in `unpack_nvfp4`, and one number by which the scales are
    multiplied; all in float32, as in ModelOpt."""
    return _e2m1(packed, scales.float() * second.reshape(()).float())


def _e2m1(packed: Tensor, finest: Tensor) -> Tensor:
    """bfloat16 [out, in] from codes [out, in / 2] and their scales float32 [out, groups]."""
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    out = torch.empty(rows, columns, dtype=torch.bfloat16)
    for start, stop in row_blocks(rows, columns):
        values = torch.empty(stop - start, finest.shape[1], columns // finest.shape[1])
        look_up(packed[start:stop].reshape(-1), _pairs_of_nibbles(torch.float32), values)
        out[start:stop] = values.mul_(finest[start:stop, :, None]).view(stop - start, columns)
    return out


def unpack_mxfp4_rows(packed: Tensor, exponents: Tensor) -> Tensor:
    """bfloat16 [out, in] from E2M1 codes [out, in / 2] and exponents [out, in / 32] (base 2, with a bias of 127). The
    result is exact."""
    exponents = exponents.view(torch.uint8)
    groups = exponents.shape[1]
    return _mxfp4(packed.reshape(packed.shape[0], groups, packed.shape[1] // groups), exponents)


def unpack_mxfp8_rows(codes: Tensor, exponents: Tensor) -> Tensor:
    """bfloat16 [out, in] from FP8 codes [out, in] and exponents [out, in / 32] (base 2, with a bias of 127). The result
    is exact down to the smallest numbers of bfloat16."""
    powers = _powers()[exponents.view(torch.uint8).int()]
    return (
        widened(codes, torch.bfloat16)
        .view(codes.shape[0], powers.shape[1], -1)
        .mul_(powers[..., None])
        .view(codes.shape)
    )


@lru_cache(maxsize=1)
def _powers() -> Tensor:
    """2^(exponent - 127) for every exponent, bfloat16; the last one is infinite."""
    return torch.ldexp(torch.ones(256), torch.arange(256) - 127).bfloat16()


def unpack_mxfp4(blocks: Tensor, exponents: Tensor) -> Tensor:
    """bfloat16 [E, in, out] from codes [E, out, in / 32, 16] (two per byte, the low nibble first) and their exponents
    [E, out, in / 32] (base 2, with a bias of 127)."""
    if blocks.shape[:-1] != exponents.shape:
        raise ValueError(f"exponents {list(exponents.shape)} for blocks {list(blocks.shape)}")
    experts, rows, groups, width = blocks.shape
    out = torch.empty(experts, groups * width * 2, rows, dtype=torch.bfloat16)
    for into, codes, exponent in zip(
        out, blocks, exponents
    ):  # one expert at a time bounds the temporary memory of the transposition
        into.copy_(_mxfp4(codes, exponent).T)
    return out


def _mxfp4(codes: Tensor, exponents: Tensor) -> Tensor:
    """bfloat16 [out, in] from codes [out, groups, width / 2] and exponents [out, groups]. It is exact, because a code
    has two significant bits."""
    rows, groups, width = codes.shape
    powers = _powers()
    infinite = bool((exponents == 255).any())
    out = torch.empty(rows, groups, 2 * width, dtype=torch.bfloat16)
    for start, stop in row_blocks(rows, groups * width):
        look_up(codes[start:stop].reshape(-1), _pairs_of_nibbles(torch.bfloat16), out[start:stop])
        if infinite:
            out[start:stop] = torch.ldexp(out[start:stop], exponents[start:stop, :, None].int() - 127)
        else:
            out[start:stop].mul_(powers[exponents[start:stop].int()].unsqueeze(-1))
    return out.view(rows, -1)
