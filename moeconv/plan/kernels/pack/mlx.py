"""The codes of MLX: affine groups of 2 to 8 bits, and MXFP4, NVFP4 and MXFP8, with the bytes of `mx.quantize`.

All arithmetic is in float32. The affine bytes are those of `mx.quantize` for every float dtype; those of the other
modes are what it computes for the weight in float32 on the CPU, where a value halfway between two codes gets the
smaller one. (In 16 bits its CPU code rounds intermediate results; its GPU code computes in float32, and rounds to
even.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from moeconv.errors import UsageError
from moeconv.plan.kernels.pack import floats
from moeconv.plan.kernels.pack.bits import join_bits
from moeconv.plan.kernels.pack.common import ROUND, SCRATCH, RowBuffers, check_finite, check_matrix, row_blocks
from moeconv.plan.kernels.pack.roundings import e2m1_codes, join_nibbles

_LEAST = 1e-7  # the smallest affine scale of mx.quantize
_MOST = {4: 6.0, 8: 448.0}  # the largest magnitudes of E2M1 and E4M3
_BIAS = 127  # of E8M0 exponents


def pack_mlx(weight: Tensor, *, mode: str, bits: int, group_size: int) -> dict[str, Tensor]:
    """Quantize one matrix [out, in] as `mx.quantize(weight, group_size, bits, mode=mode)` does.

    Returns "weight" uint8 [out, in * bits / 8] (MLX reads it as 32-bit words), and "scales" [out, in / group_size]: for
    the mode "affine" in the dtype of the weight, with "biases" of the same shape and dtype, for the others uint8 (E4M3
    for "nvfp4", else exponents). Raises UsageError for sizes that do not divide, InputError for NaN or infinity.
    """
    check_matrix(weight)
    rows, columns = weight.shape
    if columns % group_size or columns * bits % 32:
        raise UsageError(
            f"groups of {group_size} codes of {bits} bits do not fit into rows of {columns}",
            hint="Choose another group size, or leave this projection unquantized.",
        )
    made = {"weight": torch.empty(rows, columns * bits // 8, dtype=torch.uint8)}
    grid, affine = (rows, columns // group_size), mode == "affine"
    for name in ("scales", "biases") if affine else ("scales",):
        made[name] = torch.empty(grid, dtype=weight.dtype if affine else torch.uint8)
    work = RowBuffers(rows, columns)
    for start, stop in work.blocks:
        x = work.load(weight, start, stop).view(-1, group_size)
        part = {name: tensor[start:stop] for name, tensor in made.items()}
        levels = _affine(x, part, bits=bits) if affine else _float(x, part, mode=mode, bits=bits)
        _to_bytes(levels.view(stop - start, columns), part["weight"], bits=bits)
    return made


def unpack_mlx(parts: Mapping[str, Tensor], *, mode: str, bits: int, dtype: torch.dtype | None = None) -> Tensor:
    """The weight [..., out, in] from codes uint32 [..., out, in * bits / 32], scales, and for "affine" biases.

    It is equal to `mx.dequantize`, bit by bit: "affine" is computed in the dtype of the scales, where products and sums
    are rounded; the other modes are exact in bfloat16, which is the dtype of the result where `dtype` is None.
    """
    codes, scales = parts["weight"].view(torch.uint8), parts["scales"]
    *front, width = codes.shape
    columns, groups = width * 8 // bits, scales.shape[-1]
    if tuple(scales.shape[:-1]) != tuple(front) or not groups or columns % groups:
        raise ValueError(f"scales {list(scales.shape)} for codes of {[*front, columns]} weights")
    to = scales.dtype if mode == "affine" else torch.bfloat16
    count = math.prod(front)
    out = torch.empty(count, columns, dtype=to)
    codes, scales = codes.reshape(count, width), scales.reshape(count, groups)
    biases = parts["biases"].reshape(count, groups) if mode == "affine" else None
    for start, stop in row_blocks(count, columns):
        levels = _from_bytes(codes[start:stop], bits=bits).view(stop - start, groups, -1)
        if biases is not None:
            values = levels.to(to).mul_(scales[start:stop, :, None]).add_(biases[start:stop, :, None])
        else:
            values = _values(levels, bits).mul_(_factors(scales[start:stop], mode)[:, :, None])
        out[start:stop] = values.view(stop - start, columns)
    return out.view(*front, columns).to(dtype or to)


def _affine(x: Tensor, made: Mapping[str, Tensor], *, bits: int) -> Tensor:
    """The levels of groups `x` float32 [n, group]. A scale is the range divided by the number of steps, with the sign
    that makes the end with the larger magnitude the bias; it is then adjusted so that zero is a level."""
    steps = float((1 << bits) - 1)
    low, high = x.amin(-1), x.amax(-1)
    check_finite(high - low)
    below = low.abs() > high.abs()
    scale = ((high - low) / steps).clamp_(min=_LEAST)
    scale = torch.where(below, scale, -scale)
    edge = torch.where(below, low, high)
    zero = torch.round(edge / scale)
    scale = torch.where(zero != 0, edge / zero, scale)
    bias = torch.where(zero != 0, edge, 0.0)
    made["scales"].view(-1).copy_(scale)
    made["biases"].view(-1).copy_(bias)
    x.sub_(bias[:, None]).div_(scale[:, None]).add_(ROUND).clamp_(ROUND, ROUND + steps)
    return SCRATCH("codes", x.shape, torch.uint8).copy_(x.view(torch.int32))  # the low byte is the level


def _float(x: Tensor, made: Mapping[str, Tensor], *, mode: str, bits: int) -> Tensor:
    """The codes of groups `x` float32 [n, group] in E2M1 or E4M3."""
    peaks = torch.abs(x, out=SCRATCH("magnitudes", x.shape)).amax(-1).div_(_MOST[bits])
    check_finite(peaks)
    if mode == "nvfp4":
        found = peaks.clamp_(max=_MOST[8]).to(torch.float8_e4m3fn)
        scale = found.float()
        made["scales"].view(-1).copy_(found.view(torch.uint8))
        x.div_(scale.masked_fill(scale == 0, torch.inf)[:, None])
    else:
        power = torch.where(peaks > 0, torch.log2(peaks), 0.0).ceil_().clamp_(-_BIAS, _BIAS)
        made["scales"].view(-1).copy_((power + _BIAS).to(torch.uint8))
        x.div_(torch.exp2(power)[:, None])
    if bits == 8:
        return x.clamp_(-_MOST[8], _MOST[8]).to(torch.float8_e4m3fn).view(torch.uint8)
    return e2m1_codes(x, even=False, zeros="none")


def _values(codes: Tensor, bits: int) -> Tensor:
    """The numbers of E2M1 or E4M3 codes uint8, in float32."""
    if bits == 8:
        return floats.widened(codes.contiguous().view(torch.float8_e4m3fn), torch.float32)
    return torch.tensor(floats.E2M1)[codes.int()]


def _factors(scales: Tensor, mode: str) -> Tensor:
    """The numbers of stored scales uint8, in float32."""
    if mode == "nvfp4":
        return scales.contiguous().view(torch.float8_e4m3fn).float()
    return torch.exp2(scales.float() - _BIAS)


def _pack_of(bits: int) -> tuple[torch.dtype, int, int]:
    """(integer with one byte per code, number of codes, their packed bytes) for the smallest pack of whole bytes."""
    codes = 8 // math.gcd(8, bits)
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[codes], codes, codes * bits // 8


def _to_bytes(levels: Tensor, out: Tensor, *, bits: int) -> None:
    """Write codes uint8 [rows, columns] as a stream of bits, the lowest first."""
    if bits == 8:
        out.copy_(levels)
    elif bits == 4:
        join_nibbles(levels, out)
    else:
        join_bits(levels, bits=bits, out=out)


def _from_bytes(codes: Tensor, *, bits: int) -> Tensor:
    """The codes uint8 [rows, columns] of a stream of bits."""
    kind, count, width = _pack_of(bits)
    rows, mask = codes.shape[0], (1 << bits) - 1
    each = torch.zeros(rows, codes.shape[1] // width, count, dtype=torch.uint8)
    each[:, :, :width] = codes.reshape(rows, -1, width)
    packed = each.view(kind)
    spread = packed & mask
    for i in range(1, count):
        spread |= (packed & (mask << (bits * i))) << ((8 - bits) * i)
    return spread.view(torch.uint8).view(rows, -1)
