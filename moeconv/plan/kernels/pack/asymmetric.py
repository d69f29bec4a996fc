"""INT4 with zero points in the layout `pack-quantized` of compressed-tensors: levels from the lowest to the highest
weight of a group. The bytes are those of llm-compressor."""

from __future__ import annotations

import torch
from torch import Tensor

from moeconv.plan.kernels.pack.common import check_finite, check_matrix, row_blocks
from moeconv.plan.kernels.pack.integer import pack_words

_LOW, _HIGH = -8, 7


def pack_int4_asymmetric(weight: Tensor, *, group_size: int, fit: bool = False) -> dict[str, Tensor]:
    """`weight_packed` int32 [out, in / 8]; `weight_scale` [out, groups] in the dtype of the weight [out, in];
    `weight_zero_point` int32 [ceil(out / 8), groups], packed along the rows; `weight_shape` int64 [2]. A weight is
    (level - zero point) * scale. With `fit`, scales and zero points are those of (nearly) least squared error, and
    quotients are rounded in float32 instead of in the dtype of the weight.

    Raises UsageError for a weight that is not a float matrix, InputError for NaN or infinity in it.
    """
    check_matrix(weight)
    rows, columns = weight.shape
    scales, zeros = (_fitted if fit else _ranges)(weight, group_size)
    levels = torch.empty(rows, columns, dtype=torch.int8)
    for start, stop in row_blocks(rows, columns):
        x = weight[start:stop].view(stop - start, -1, group_size)
        x = (x.float() if fit else x) / scales[start:stop, :, None]
        x += zeros[start:stop, :, None]
        levels[start:stop].copy_(x.clamp_(_LOW, _HIGH).round_().view(stop - start, columns))
    padded = torch.full((scales.shape[1], -(-rows // 8) * 8), _LOW, dtype=torch.int8)
    padded[:, :rows] = zeros.T
    return {
        "weight_packed": pack_words(levels, bits=4),
        "weight_scale": scales,
        "weight_zero_point": pack_words(padded, bits=4).T.contiguous(),
        "weight_shape": torch.tensor([rows, columns]),
    }


def _ranges(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Scales and zero points [rows, groups], in the dtype of `weight`. The range of a group includes zero."""
    rows, columns = weight.shape
    scales = torch.empty(rows, columns // group, dtype=weight.dtype)
    zeros = torch.empty_like(scales)
    for start, stop in row_blocks(rows, columns):
        x = weight[start:stop].float().view(stop - start, -1, group)
        low, high = x.amin(-1).clamp_(max=0).to(weight.dtype), x.amax(-1).clamp_(min=0).to(weight.dtype)
        range_ = high - low
        if not range_.isfinite().all():  # the largest numbers of float16 have a range above it
            range_ = high.float() - low.float()
        each = scales[start:stop].copy_(range_ / (_HIGH - _LOW))
        check_finite(each)
        found = (_LOW - low / each).clamp_(_LOW, _HIGH).round_()
        zeros[start:stop] = torch.nan_to_num(found, nan=0.0)  # 0 / 0 in a group of zeros
    return scales.masked_fill_(scales == 0, torch.finfo(scales.dtype).eps), zeros


def _fitted(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Scales and zero points as `_ranges` returns them, of less squared error, or of the same. For the zero point of
    the range and those beside it, the smallest scale without clipping is fitted to the levels that it gives, twice."""
    scales, zeros = _ranges(weight, group)
    for start, stop in row_blocks(*weight.shape):
        x = weight[start:stop].float().view(-1, group)
        peak = x.abs().amax(-1)
        peak.masked_fill_(peak == 0, 1.0)
        x = x / peak[:, None]  # so that squares neither overflow nor underflow
        low, high = x.amin(-1).clamp_(max=0), x.amax(-1).clamp_(min=0)
        best, place = scales[start:stop].view(-1), zeros[start:stop].view(-1)
        first = place.float()
        _, _, least = _fit(x, best.float() / peak, first)
        for zero in (first, first - 1, first + 1):
            zero = zero.clamp(_LOW, _HIGH)
            # 0 / 0 where there are no weights on a side without levels
            above, below = (
                part.nan_to_num(nan=0.0, posinf=torch.inf) for part in (high / (_HIGH - zero), -low / (zero - _LOW))
            )
            size = torch.maximum(above, below)
            for _ in range(3):
                stored = (size * peak).to(best.dtype)
                usable = stored.isfinite() & (stored > 0)
                energy, along, error = _fit(x, stored.float() / peak, zero)
                better = usable & (error < least)
                best.copy_(torch.where(better, stored, best))
                place.copy_(torch.where(better, zero, place))
                least = torch.where(better, error, least)
                size = along / energy
    return scales, zeros


def _fit(x: Tensor, sizes: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(sum q^2, sum x q, the squared error minus sum x^2) per group, where q are the levels of x [groups, group] minus
    their zero points, for scales and zero points [groups]."""
    zero = zeros[:, None]
    q = (x / sizes[:, None]).add_(zero).clamp_(_LOW, _HIGH).round_().sub_(zero)
    along, energy = (x * q).sum(-1), q.square().sum(-1)
    return energy, along, sizes * (sizes * energy - 2 * along)
