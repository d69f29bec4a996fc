"""The largest magnitudes of groups of weights, in the dtype of the weights, and scales that follow from them."""

from __future__ import annotations

import torch
from torch import Tensor

from moeconv.plan.kernels.pack.common import SCRATCH, check_finite, row_blocks

_SHORT, _LONG = 32, 256  # torch reduces groups of these sizes faster as floats than as integers
_MASK = 0x7FFF  # all bits of a 16-bit float but the sign; without it, floats are ordered as integers are


def peaks(weight: Tensor, *, group: int) -> Tensor:
    """max |w| of every `group` weights of a row, [rows, groups] in the dtype of `weight` [rows, columns]. A group with
    NaN or infinity gives NaN or infinity."""
    rows, columns = weight.shape
    found = torch.empty(rows, columns // group, dtype=weight.dtype)
    for start, stop in row_blocks(rows, columns):
        _peaks(weight[start:stop], group, found[start:stop])
    return found


def _peaks(x: Tensor, group: int, out: Tensor) -> None:
    rows = x.shape[0]
    if x.dtype is torch.float32 or _SHORT <= group < _LONG:
        sizes = SCRATCH("sizes", x.shape).copy_(x).abs_()
        out.copy_(sizes.view(rows, -1, group).amax(-1))
        return
    bits = torch.bitwise_and(x.view(torch.int16), _MASK, out=SCRATCH("sizes", x.shape, torch.int16))
    out.view(torch.int16).copy_(bits.view(rows, -1, group).amax(-1))


def column_peaks(weight: Tensor) -> Tensor:
    """max |w| of every column, [columns] in the dtype of `weight` [rows, columns]."""
    if weight.dtype is torch.float32:
        return weight.abs().amax(0)
    bits = torch.bitwise_and(weight.view(torch.int16), _MASK, out=SCRATCH("sizes", weight.shape, torch.int16))
    return bits.amax(0).view(weight.dtype)


def usable(scales: Tensor) -> Tensor:
    """The scales, in place; a zero scale becomes eps, as in compressed-tensors. Raises InputError for NaN or infinity,
    which then come from a weight."""
    check_finite(scales)
    return scales.masked_fill_(scales == 0, torch.finfo(scales.dtype).eps)
