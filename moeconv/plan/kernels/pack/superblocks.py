"""The block formats of ggml with 256 weights per super-block: Q2_K to Q6_K and IQ4_XS.

A super-block has blocks of 16 or 32 weights. Scales (and minimums, where the format has them) are integers per block,
in units of one or two float16 numbers per super-block. The layouts are those of ggml's block_q2_K, block_q3_K,
block_q4_K, block_q5_K, block_q6_K and block_iq4_xs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeconv.plan.kernels.pack.blocks import (
    Integers,
    Levels,
    Table,
    Weighted,
    affine,
    fit_line,
    half,
    symmetric,
)

IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
IQ4 = Table(IQ4_LEVELS)


@dataclass(frozen=True)
class _Starts:
    """How the scales of a format are searched: the `starts` of a block's scale and of the number that all scales of a
    super-block are multiples of (see blocks.py)."""

    starts: Sequence[float]
    outer: Sequence[float]
    rounds: int = 1


def q2_k(x: Tensor, w: Tensor | None) -> Tensor:
    """[16, 16, B] -> uint8 [84, B]."""
    codes, scales, mins, d, dmin = _with_minimums(x, w, 3, 15, _Q2, "Q2_K")
    q = _octets(codes).view(2, 4, 32, -1)
    packed = q[:, 0] | q[:, 1] << 2 | q[:, 2] << 4 | q[:, 3] << 6
    return torch.cat([_octets(scales) | _octets(mins) << 4, packed.view(64, -1), _float16(d), _float16(dmin)])


def q4_k(x: Tensor, w: Tensor | None) -> Tensor:
    """[8, 32, B] -> uint8 [144, B]."""
    codes, scales, mins, d, dmin = _with_minimums(x, w, 15, 63, _Q4, "Q4_K")
    q = _octets(codes).view(4, 2, 32, -1)
    packed = (q[:, 0] | q[:, 1] << 4).view(128, -1)
    return torch.cat([_float16(d), _float16(dmin), _six_bits(scales, mins), packed])


def q5_k(x: Tensor, w: Tensor | None) -> Tensor:
    """[8, 32, B] -> uint8 [176, B]."""
    codes, scales, mins, d, dmin = _with_minimums(x, w, 31, 63, _Q5, "Q5_K")
    q = _octets(codes).view(8, 32, -1)
    low = (q & 15).view(4, 2, 32, -1)
    packed = (low[:, 0] | low[:, 1] << 4).view(128, -1)
    return torch.cat([_float16(d), _float16(dmin), _six_bits(scales, mins), _bits(q >> 4), packed])


def q3_k(x: Tensor, w: Tensor | None) -> Tensor:
    """[16, 16, B] -> uint8 [110, B]."""
    values = Weighted(x, w)
    scales, d = _multiples(values, Integers(-4, 3), Integers(-32, 31), _Q3, "Q3_K")
    q = _octets(values.over(scales * d, Integers(-4, 3)).add_(4))
    low = (q & 3).view(2, 4, 32, -1)
    packed = (low[:, 0] | low[:, 1] << 2 | low[:, 2] << 4 | low[:, 3] << 6).view(64, -1)
    s = _octets(scales.add_(32))
    high = (s >> 4).view(4, 4, -1)
    tail = high[0] | high[1] << 2 | high[2] << 4 | high[3] << 6
    return torch.cat([_bits((q >> 2).view(8, 32, -1)), packed, s[:8] & 15 | s[8:] << 4, tail, _float16(d)])


def q6_k(x: Tensor, w: Tensor | None) -> Tensor:
    """[16, 16, B] -> uint8 [210, B]."""
    values = Weighted(x, w)
    scales, d = _multiples(values, Integers(-32, 31), Integers(-128, 127), _Q6, "Q6_K")
    q = _octets(values.over(scales * d, Integers(-32, 31)).add_(32)).view(2, 4, 32, -1)
    low, high = q & 15, q >> 4
    first = torch.stack([low[:, 0] | low[:, 2] << 4, low[:, 1] | low[:, 3] << 4], 1)
    second = high[:, 0] | high[:, 1] << 2 | high[:, 2] << 4 | high[:, 3] << 6
    return torch.cat([first.view(128, -1), second.view(64, -1), _octets(scales), _float16(d)])


def iq4_xs(x: Tensor, w: Tensor | None) -> Tensor:
    """[8, 32, B] -> uint8 [136, B]."""
    values = Weighted(x, w)
    scales, d = _multiples(values, IQ4, Integers(-32, 31), _IQ4, "IQ4_XS")
    step = scales * d
    inverse = torch.where(step != 0, step.reciprocal(), 0.0)
    q = IQ4.codes(torch.mul(x, inverse[:, None], out=values.codes)).view(8, 2, 16, -1)
    s = _octets(scales.add_(32))
    low, high = s & 15, s >> 4
    high = torch.stack([high[i] | high[i + 1] << 2 | high[i + 2] << 4 | high[i + 3] << 6 for i in (0, 4)])
    return torch.cat([_float16(d), high, low[::2] | low[1::2] << 4, (q[:, 0] | q[:, 1] << 4).view(128, -1)])


_Q2 = _Starts((2.2, 2.6, 3.0, 3.4, 3.8), (15.0, 14.0, 13.0, 15.4), rounds=2)
_Q4 = _Starts((14.2, 14.6, 15.0, 15.45), (63.0, 62.0))
_Q5 = _Starts((30.2, 30.7, 31.2), (63.0, 62.0))
_Q3 = _Starts((-4.5, -4.1, -3.7, -3.3, -2.9), (-32.0, -31.4, -30.6, 31.0, 30.2))
_Q6 = _Starts((-32.5, -32.0, -31.5, -31.0), (-128.0, -127.0))
_IQ4 = _Starts((-133.0, -127.0, -121.0, -115.0, 113.0), (-32.0, -31.4, 31.0))


def _multiples(
    values: Weighted, levels: Levels, integers: Integers, search: _Starts, name: str
) -> tuple[Tensor, Tensor]:
    """(scales [S, B] as integers, their unit d [B]) of least squared error of d * scale * level."""
    scale, curvature = symmetric(values, levels, search.starts, search.rounds)
    d = _unit(scale, curvature, integers, search.outer, name)
    scales = _rounded(scale, d, integers)
    values.over(scales * d, levels)
    qx, qq = values.products()
    scales = _rounded(qx / qq.clamp(min=1e-30), d, integers)
    d = half((scales * qx).sum(0) / (scales * scales * qq).sum(0).clamp(min=1e-30), name)
    return scales, d


def _unit(scale: Tensor, curvature: Tensor, integers: Integers, starts: Sequence[float], name: str) -> Tensor:
    """The number d [B], as float16 holds it, of which integers best make the scales [S, B]."""
    d, _ = symmetric(Weighted(scale[None], curvature[None]), integers, starts)
    return half(d[0], name)


def _rounded(scale: Tensor, d: Tensor, integers: Integers) -> Tensor:
    return integers.nearest_(scale * torch.where(d != 0, d.reciprocal(), 0.0))


def _with_minimums(
    x: Tensor, w: Tensor | None, top: int, most: int, search: _Starts, name: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(codes 0..top, scales 0..most [S, B], minimums 0..most, d [B], dmin [B]) of least squared error of d * scale *
    code - dmin * minimum."""
    values, levels, integers = Weighted(x, w), Integers(0, top), Integers(0, most)
    total, sum_x = values.total, values.wx.sum(1)
    line = affine(values, top, search.starts, search.rounds)
    spread = (line.qq - line.q * line.q / total).clamp_(min=1e-30)
    d = _unit(line.scale, spread, integers, search.outer, name)
    scales = _rounded(line.scale, d, integers)
    # the best minimum for the rounded scale makes up for most of the rounding
    offset = ((d * scales * line.q - sum_x) / total).clamp_(min=0)
    dmin = _unit(offset, total, integers, search.outer, name)
    mins = _rounded(offset, dmin, integers)
    q, qq, qx = _codes(values, levels, d * scales, dmin * mins)
    found, _ = fit_line((q, qq, qx), sum_x, total)
    scales = _rounded(found.scale, d, integers)
    mins = _rounded(((d * scales * q - sum_x) / total).clamp_(min=0), dmin, integers)
    d, dmin = _units_of(scales, mins, (q, qq, qx), sum_x, total, name)
    values.over(d * scales, levels, dmin * mins)
    return values.codes, scales, mins, d, dmin


def _codes(values: Weighted, levels: Levels, step: Tensor, low: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values.over(step, levels, low)
    return values.sums()


def _units_of(
    scales: Tensor, mins: Tensor, sums: tuple[Tensor, Tensor, Tensor], sum_x: Tensor, total: Tensor, name: str
) -> tuple[Tensor, Tensor]:
    """The numbers d and dmin [B] of least squared error for codes with these sums, and integers that are given."""
    q, qq, qx = sums
    aa, bb = (scales * scales * qq).sum(0), (mins * mins * total).sum(0)
    ab = -(scales * mins * q).sum(0)
    ax, bx = (scales * qx).sum(0), -(mins * sum_x).sum(0)
    determinant = aa * bb - ab * ab
    both = determinant > 1e-6 * aa * bb
    safe = torch.where(both, determinant, 1.0)
    d = torch.where(both, (ax * bb - bx * ab) / safe, ax / aa.clamp(min=1e-30))
    dmin = torch.where(both, (bx * aa - ax * ab) / safe, 0.0)
    return half(d.clamp_(min=0), name), half(dmin.clamp_(min=0), name)


def _octets(values: Tensor) -> Tensor:
    """Whole numbers as bytes, negative ones in two's complement, with the first two axes joined where there are
    three."""
    flat = values.reshape(-1, values.shape[-1]) if values.ndim == 3 else values
    return flat.to(torch.int32).to(torch.uint8)


def _float16(values: Tensor) -> Tensor:
    """float32 [B] -> the bytes of float16, [2, B]."""
    return values.half().view(torch.uint8).view(-1, 2).t()


def _bits(bits: Tensor) -> Tensor:
    """[8, n, B] of 0 and 1 -> bytes [n, B], bit i from the i-th slice."""
    out = bits[0].clone()
    for i in range(1, 8):
        out |= bits[i] << i
    return out


def _six_bits(scales: Tensor, mins: Tensor) -> Tensor:
    """Eight scales and eight minimums of 6 bits, [8, B] each -> 12 bytes."""
    s, m = _octets(scales), _octets(mins)
    return torch.cat([s[:4] | s[4:] >> 4 << 6, m[:4] | m[4:] >> 4 << 6, s[4:] & 15 | (m[4:] & 15) << 4])
