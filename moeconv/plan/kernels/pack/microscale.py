"""The shared exponents of OCP Microscaling (MXFP4 and MXFP8, 2023), as compressed-tensors chooses them."""

from __future__ import annotations

import torch
from torch import Tensor

from moeconv.plan.kernels.pack.common import check_finite

MX_GROUP = 32
_BIAS = 127


def exponents_of(peak: Tensor, *, below: int) -> Tensor:
    """The exponent of each group, uint8 with a bias of 127, for groups with the largest magnitudes `peak` (any float
    dtype). The peak is rounded to a power of two, up from 1.75 times the power below, and its exponent is lowered by
    `below`, the exponent of the largest code. Groups that are too small have exponent 0. Raises InputError for NaN or
    infinity."""
    check_finite(peak)
    bits = peak.float().view(torch.int32)
    exponent = ((bits + (1 << 21)) >> 23) - below  # a mantissa of 1.75 or more carries into the exponent
    return exponent.clamp_(0, 254).to(torch.uint8)


def exponents_from(scales: Tensor) -> Tensor:
    """The exponents, uint8 with a bias of 127, of scales that are powers of two, float32."""
    return (scales.view(torch.int32) >> 23).to(torch.uint8)


def powers_below(exponents: Tensor) -> Tensor:
    """2^(127 - exponent) in float32: what a weight is multiplied by before it is rounded to a code."""
    bits = exponents.int().neg_().add_(2 * _BIAS)  # the exponent of the result, which ends at 2^-127
    return torch.where(bits > 0, bits << 23, 1 << 22).int().view(torch.float32)
