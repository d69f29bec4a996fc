"""The largest magnitudes of groups of weights, in the dtype of the weights, and scales that follow from them."""

from __future__ import annotations

import torch
from torch import Tensor

from moeconv.plan.kernels.pack.common import check_finite, row_blocks

_MASK = 0x7FFF  # all bits of a 16-bit float but the sign; without it, floats are ordered as integers are


def peaks(weight: Tensor, *, group: int) -> Tensor:
    """max |w| of every `group` weights of a row, [rows, groups] in the dtype of `weight` [rows, columns]. A group with
    NaN or infinity gives NaN or infinity."""
    rows, columns = weight.shape
    found = torch.empty(rows, columns // group, dtype=weight.dtype)
    for start, stop in row_blocks(rows, columns):
        found[start:stop] = _peaks(weight[start:stop], group)
    return found


def _peaks(x: Tensor, group: int) -> Tensor:
    if x.dtype is torch.float32:
        return x.abs().view(x.shape[0], -1, group).amax(-1)
    bits = torch.bitwise_and(x.view(torch.int16), _MASK)
    return bits.view(x.shape[0], -1, group).amax(-1).view(x.dtype)


def column_peaks(weight: Tensor) -> Tensor:
    """max |w| of every column, [columns] in the dtype of `weight` [rows, columns]."""
    if weight.dtype is torch.float32:
        return weight.abs().amax(0)
    return torch.bitwise_and(weight.view(torch.int16), _MASK).amax(0).view(weight.dtype)


def usable(scales: Tensor) -> Tensor:
    """The scales, in place; a zero scale becomes eps, as in compressed-tensors. Raises InputError for NaN or infinity,
    which a weight has then too."""
    check_finite(scales)
    return scales.masked_fill_(scales == 0, torch.finfo(scales.dtype).eps)
