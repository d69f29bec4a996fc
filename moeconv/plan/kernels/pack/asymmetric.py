"""INT4 with zero points in the layout `pack-quantized` of compressed-tensors: levels from the lowest to the highest
weight of a group. The bytes are those of llm-compressor."""

from __future__ import annotations

import torch
from torch import Tensor

from moeconv.plan.kernels.pack.common import check_finite, check_matrix, row_blocks
from moeconv.plan.kernels.pack.integer import pack_words

_LOW, _HIGH = -8, 7


def pack_int4_asymmetric(weight: Tensor, *, group_size: int) -> dict[str, Tensor]:
    """`weight_packed` int32 [out, in / 8]; `weight_scale` [out, groups] in the dtype of the weight [out, in];
    `weight_zero_point` int32 [ceil(out / 8), groups], packed along the rows; `weight_shape` int64 [2]. A weight is
    (level - zero point) * scale.

    Raises UsageError for a weight that is not a float matrix, InputError for NaN or infinity in it.
    """
    check_matrix(weight)
    rows, columns = weight.shape
    scales, zeros = _ranges(weight, group_size)
    levels = torch.empty(rows, columns, dtype=torch.int8)
    for start, stop in row_blocks(rows, columns):
        x = weight[start:stop].view(stop - start, -1, group_size) / scales[start:stop, :, None]
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
        each = scales[start:stop].copy_((high - low) / (_HIGH - _LOW))
        check_finite(each)
        found = (_LOW - low / each).clamp_(_LOW, _HIGH).round_()
        zeros[start:stop] = torch.nan_to_num(found, nan=0.0)  # 0 / 0 in a group of zeros
    return scales.masked_fill_(scales == 0, torch.finfo(scales.dtype).eps), zeros
