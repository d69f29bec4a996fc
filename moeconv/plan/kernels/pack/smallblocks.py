"""The block formats of ggml with 32 weights per block: Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL and MXFP4.

The layouts are those of ggml's block_q4_0, block_q4_1, block_q5_0, block_q5_1, block_iq4_nl and block_mxfp4. Each
function takes float32 [1, 32, B] and the importance of the weights (or None), and returns bytes [n, B].
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeconv.plan.kernels.pack.blocks import Integers, Levels, Weighted, affine, half, symmetric
from moeconv.plan.kernels.pack.common import check_finite
from moeconv.plan.kernels.pack.superblocks import IQ4

_LEAST = 1e-38
_BIAS, _HALVED = 127, 1  # of E8M0, and the factor 2 by which ggml's integers are larger than E2M1


def q4_0(x: Tensor, w: Tensor | None) -> Tensor:
    """-> [18, B]."""
    values = Weighted(x, w)
    d = _scale(values, Integers(-8, 7), (-8.6, -8.2, -7.8, -7.4, -7.0, 7.2), "Q4_0")
    return torch.cat([_float16(d), _nibbles(values.codes.add_(8))])


def q5_0(x: Tensor, w: Tensor | None) -> Tensor:
    """-> [22, B]."""
    values = Weighted(x, w)
    d = _scale(values, Integers(-16, 15), (-16.5, -16.0, -15.5, -15.0), "Q5_0")
    return torch.cat([_float16(d), *_five_bits(values.codes.add_(16))])


def q4_1(x: Tensor, w: Tensor | None) -> Tensor:
    """-> [20, B]."""
    codes, d, low = _line(Weighted(x, w), 15, (13.6, 14.2, 14.6, 15.0, 15.4, 16.0), "Q4_1")
    return torch.cat([_float16(d), _float16(low), _nibbles(codes)])


def q5_1(x: Tensor, w: Tensor | None) -> Tensor:
    """-> [24, B]."""
    codes, d, low = _line(Weighted(x, w), 31, (29.5, 30.2, 30.6, 31.0, 31.6, 32.4), "Q5_1")
    return torch.cat([_float16(d), _float16(low), *_five_bits(codes)])


def iq4_nl(x: Tensor, w: Tensor | None) -> Tensor:
    """-> [18, B]."""
    values = Weighted(x, w)
    scale, _ = symmetric(values, IQ4, (-133.0, -127.0, -121.0, -115.0, 113.0))
    d = half(scale, "IQ4_NL")
    inverse = torch.where(d != 0, d.reciprocal(), 0.0)
    return torch.cat([_float16(d), _halves(IQ4.codes(torch.mul(x, inverse[:, None], out=values.codes)))])


class _E2M1:
    """0, 0.5, 1, 1.5, 2, 3, 4 and 6 with either sign, times 2 as ggml has them."""

    def nearest_(self, values: Tensor) -> Tensor:
        magnitude = values.abs().clamp_(max=12)
        # steps of 1 up to 4, of 2 up to 8, then 12
        step = (magnitude >= 4).float().add_(magnitude >= 8, alpha=2).add_(1)
        return values.copy_(torch.copysign((magnitude / step).round_().mul_(step), values))


def mxfp4(x: Tensor, w: Tensor | None) -> Tensor:
    """-> [17, B]: an exponent of 2 per block, which is that of the largest magnitude or the next one, whichever has
    the smaller error, and codes of 4 bits."""
    values, levels = Weighted(x, w), _E2M1()
    peak = x.abs().amax(1)
    check_finite(peak)
    exponent = torch.frexp(peak.clamp(min=_LEAST)).exponent - 1 - 2  # floor(log2(peak)) - 2
    exponent = torch.where(peak > 0, exponent, -_BIAS).clamp_(-_BIAS, 127 - 2)
    errors = [_error(values, levels, exponent + more) for more in (0, 1)]
    exponent = exponent + ((errors[1] < errors[0]) & (peak > 0))
    values.over(_unit(exponent), levels)
    magnitude = values.codes.abs()
    index = torch.where(magnitude > 4, magnitude / 2 + 2, magnitude).clamp_(max=8)  # 0..4, then 6, 8 and 12
    index = torch.where(magnitude == 12, 7.0, index)
    codes = index.add_((values.codes < 0) & (index > 0), alpha=8)
    return torch.cat([(exponent + _BIAS).to(torch.uint8), _nibbles(codes)])


def _unit(exponent: Tensor) -> Tensor:
    return torch.ldexp(torch.ones(exponent.shape), exponent - _HALVED)


def _error(values: Weighted, levels: Levels, exponent: Tensor) -> Tensor:
    unit = _unit(exponent)
    values.over(unit, levels)
    qx, qq = values.products()
    return unit * (unit * qq - 2 * qx)


def _scale(values: Weighted, levels: Integers, starts: tuple[float, ...], name: str) -> Tensor:
    """The scale [1, B] as float16 holds it; the codes are in `values`."""
    d = half(symmetric(values, levels, starts)[0], name)
    values.over(d, levels)
    return d


def _line(values: Weighted, top: int, starts: tuple[float, ...], name: str) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, lowest value) of least squared error of scale * code + lowest value."""
    line = affine(values, top, starts, rounds=2, free=True)
    d = half(line.scale.clamp_(min=0), name)
    # the best lowest value for the rounded scale
    low = half((values.wx.sum(1) - d * line.q) / values.total, name)
    return values.over(d, Integers(0, top), -low), d, low


def _float16(values: Tensor) -> Tensor:
    """float32 [1, B] -> the bytes of float16, [2, B]."""
    return values.reshape(-1).half().view(torch.uint8).view(-1, 2).t()


def _nibbles(codes: Tensor) -> Tensor:
    return _halves(codes[0].to(torch.int32).to(torch.uint8)[None])


def _halves(codes: Tensor) -> Tensor:
    """Codes of 4 bits [1, 32, B] -> [16, B]: the first half in the low nibbles, the second in the high ones."""
    return codes[0, :16] | codes[0, 16:] << 4


def _five_bits(codes: Tensor) -> tuple[Tensor, Tensor]:
    """(fifth bits [4, B], nibbles [16, B])."""
    q = codes[0].to(torch.int32).to(torch.uint8)
    high = (q >> 4).view(4, 8, -1)
    fifth = high[:, 0].clone()
    for i in range(1, 8):
        fifth |= high[:, i] << i
    return fifth, _halves((q & 15)[None])
