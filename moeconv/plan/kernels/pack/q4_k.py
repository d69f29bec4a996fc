"""Q4_K, the block_q4_K of ggml: super-blocks of 256 weights, each of 8 blocks of 32, with 4.5 bits per weight.

w = d * scale * q - dmin * min, with q in 0..15, scale and min in 6 bits per block, and d and dmin in float16 per
super-block. The scale and minimum of a block are searched for the least squared error: a few scales that cover the
whole range are tried (ggml's make_qkx2_quants tries 21), and the best of them is improved by least squares after
rounding. The minimum is then chosen again for the scale as rounded to 6 bits.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moeconv.errors import InputError
from moeconv.plan.kernels.pack.common import check_finite

_STARTS = (14.2, 14.6, 15.0, 15.45)  # numbers of levels that a block's range is divided into, all below 15.5
_ROUNDS = 1  # rounds of rounding and least squares
_SIZE = 32
_LARGEST = 63 * 65504.0
_TINY = float(np.finfo(np.float32).tiny)
_ONES = torch.ones(_SIZE)


def encode_q4_k(weight: Tensor, out: Tensor, work: Tensor) -> None:
    """Encode float32 [n, 256] to uint8 [n, 144]. `work` float32 [3, at least 256 n] is scratch memory. Raises
    InputError for NaN, infinity, and values that are too large for float16 scales."""
    x = weight.view(-1, _SIZE)
    codes, scratch, unit = work[:, : x.numel()].view(3, -1, _SIZE).unbind()
    scale, offset, summed = (part.view(-1, 8) for part in _search(x, codes, scratch, unit))
    if float(torch.maximum(scale.max(), offset.max())) > _LARGEST:
        raise InputError("its values are too large for Q4_K", hint="Use another scheme.")
    d, dmin = _half(scale.amax(1, keepdim=True) / 63), _half(offset.amax(1, keepdim=True) / 63)  # [n, 1]
    scales = scale.div_(d.clamp(min=_TINY)).round_().clamp_(0, 63)
    step = d * scales
    # the best minimum for the rounded scale compensates most of the rounding
    offset = (step * summed).sub_(torch.mv(x, _ONES).view(-1, 8)).mul_(1 / _SIZE)
    mins = offset.div_(dmin.clamp(min=_TINY)).round_().clamp_(0, 63)
    step = step.view(-1)
    inverse = torch.where(step > 0, step.reciprocal(), 0.0)
    low = (dmin * mins).view(-1).mul_(inverse)
    torch.mul(x, inverse[:, None], out=codes).add_(low[:, None]).round_().clamp_(0, 15)
    _write(out, codes, scratch, scales, mins, d, dmin)


def _search(x: Tensor, codes: Tensor, scratch: Tensor, unit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(scale, -minimum, sum of the codes), each [n] and not negative, of least squared error for x [n, 32] and codes in
    0..15."""
    low = x.amin(1).clamp_(max=0)
    width = x.amax(1).sub_(low)
    check_finite(width)
    # in units of the block's range, so that float32 is exact enough: 0..1, with the value 0 at -base
    narrow = width.clamp(min=_TINY)
    torch.sub(x, low[:, None], out=unit).mul_(narrow.reciprocal()[:, None])
    base, total = low / narrow, torch.mv(unit, _ONES)
    sums, better = torch.empty(3, len(x)), torch.empty(len(x))
    scale = shift = gain = None
    for levels in _STARTS:
        torch.mul(unit, levels, out=codes).round_()  # at most 15
        _sums(codes, unit, scratch, sums)
        found, covariance = _slope(sums, total)
        moved, reached = _shift(found, sums, total), covariance.mul_(found)
        if scale is None or shift is None or gain is None:
            scale, shift, gain = found, moved, reached
            continue
        torch.gt(reached, gain, out=better)
        scale.lerp_(found, better)  # by 0 or 1: several times as fast as torch.where
        shift.lerp_(moved, better)
        torch.maximum(gain, reached, out=gain)
    assert scale is not None and shift is not None
    _keep_minimum(scale, shift, sums, base)
    for _ in range(_ROUNDS):
        inverse = scale.clamp_(min=_TINY).reciprocal_()
        torch.sub(unit, shift[:, None], out=codes).mul_(inverse[:, None]).round_().clamp_(0, 15)
        _sums(codes, unit, scratch, sums)
        scale, _ = _slope(sums, total)
        shift = _shift(scale, sums, total)
        _keep_minimum(scale, shift, sums, base)
    return scale.clamp_(min=0).mul_(width), shift.mul_(width).add_(low).neg_().clamp_(min=0), sums[0]


def _sums(codes: Tensor, unit: Tensor, scratch: Tensor, out: Tensor) -> None:
    """Write the sums of q, q^2 and q * unit over each block to out [3, n]."""
    torch.mv(codes, _ONES, out=out[0])
    torch.mv(torch.mul(codes, codes, out=scratch), _ONES, out=out[1])
    torch.mv(torch.mul(codes, unit, out=scratch), _ONES, out=out[2])


def _slope(sums: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """The least-squares fit of unit = scale * q + shift: (scale, covariance of q and unit times 32^2). Their product
    ranks candidate codes by the variance that they explain. Sums of codes are exact, so that the scale is 0 if all
    codes are equal."""
    q, qq, qu = sums.unbind(0)
    determinant = (qq * _SIZE).sub_(q * q)
    covariance = (qu * _SIZE).sub_(q * total)
    return covariance / determinant.clamp_(min=1), covariance


def _shift(scale: Tensor, sums: Tensor, total: Tensor) -> Tensor:
    return (scale * sums[0]).sub_(total).mul_(-1 / _SIZE)


def _keep_minimum(scale: Tensor, shift: Tensor, sums: Tensor, base: Tensor) -> None:
    """For blocks whose minimum would be above 0 or whose codes are all equal: the least-squares scale with a minimum of
    0."""
    q, qq, qu = sums.unbind(0)
    rows = ((shift > -base) | (scale <= 0)).nonzero().flatten()
    if len(rows):
        scale[rows] = ((qu + base * q) / qq.clamp(min=1))[rows]
        shift[rows] = -base[rows]


def _write(out: Tensor, codes: Tensor, scratch: Tensor, scales: Tensor, mins: Tensor, d: Tensor, dmin: Tensor) -> None:
    out[:, 0:2] = d.half().view(torch.uint8)
    out[:, 2:4] = dmin.half().view(torch.uint8)
    s, m = scales.to(torch.uint8), mins.to(torch.uint8)
    out[:, 4:8] = s[:, :4] | (s[:, 4:] >> 4 << 6)
    out[:, 8:12] = m[:, :4] | (m[:, 4:] >> 4 << 6)
    out[:, 12:16] = (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4
    # a byte has the code of an even block in its low nibble, and that of the next (odd) block in its high nibble
    pairs = codes.view(-1, 4, 2, _SIZE)
    half = scratch.view(-1)[: codes.numel() // 2].view(-1, 4, _SIZE)
    torch.add(pairs[:, :, 0], pairs[:, :, 1], alpha=16, out=half)
    # through int32, because the direct conversion to bytes is slow
    out[:, 16:].copy_(half.to(torch.int32).view(-1, 128))


def _half(values: Tensor) -> Tensor:
    """Values rounded to float16, as float32."""
    return values.half().float()
