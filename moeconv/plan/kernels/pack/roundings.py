"""Floats rounded to the codes of E2M1 and E4M3, in few passes over blocks that stay in the cache."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from moeconv.plan.kernels.pack.common import SCRATCH
from moeconv.plan.kernels.pack.float_grids import E2M1_LEVELS
from moeconv.plan.kernels.pack.levels import E4M3_MAX

_CUT = 20  # bits of a float32 below its three highest bits of mantissa; all midpoints between levels end there


def e2m1_codes(x: Tensor, *, even: bool = True, zeros: str = "numbers") -> Tensor:
    """The codes of `x` float32, contiguous, as uint8 of its shape in scratch memory.

    `even`: a number in the middle of two codes gets the even one, otherwise the smaller one. `zeros` states which codes
    of zero have a sign: those that come from negative "numbers", "all" with those of -0 too, or "none".
    """
    count = x.numel()
    bits = x.view(-1).view(torch.int32).numpy().view(np.uint32)
    keys = SCRATCH("keys", (count,), torch.int32)
    upper = keys.numpy().view(np.uint32)
    above = SCRATCH("above", (count,), torch.int32).numpy().view(np.uint32)
    # twice the upper bits, plus one where a lower bit is set: what lies between two midpoints has one key
    np.right_shift(bits, _CUT, out=upper)
    np.add(bits, (1 << _CUT) - 1, out=above)
    np.right_shift(above, _CUT, out=above)
    np.add(upper, above, out=upper)
    codes = SCRATCH("codes", (count,), torch.uint8)
    return torch.index_select(_code_of_key(even, zeros), 0, keys, out=codes).view(x.shape)


@lru_cache(maxsize=4)
def _code_of_key(even: bool, zeros: str) -> Tensor:
    """The code, uint8 [8192], of every key of `e2m1_codes`."""
    keys = np.arange(1 << (33 - _CUT), dtype=np.uint32)
    inside = keys & 1  # between two values whose lower bits are zero: take one of them
    values = np.abs(((keys >> 1 << _CUT) | inside).view(np.float32))
    middles = np.array([(low + high) / 2 for low, high in pairwise(E2M1_LEVELS)], np.float32)
    below = np.searchsorted(middles, values, side="left")  # midpoints below the value: a tie goes down
    tie = (below < len(middles)) & (values == middles[np.minimum(below, len(middles) - 1)])
    code = below + (tie & (below % 2 == 1)) if even else below
    negative = ((keys >> 1 << _CUT) >> 31).astype(bool)
    signed = {"all": negative, "numbers": negative & (values > 0), "none": negative & (code > 0)}[zeros]
    return torch.from_numpy((code | (signed.astype(np.int64) << 3)).astype(np.uint8))


def join_nibbles(codes: Tensor, out: Tensor) -> None:
    """Write uint8 `codes` below 16 in pairs, the first in the low nibble, to the bytes of `out`. Both are
    contiguous."""
    twos = codes.view(-1).view(torch.int16)  # first | second << 8
    pairs = SCRATCH("pairs", twos.shape, torch.int16).numpy()
    np.right_shift(twos.numpy(), 4, out=pairs)  # numpy shifts 16-bit integers six times faster than torch
    np.bitwise_or(pairs, twos.numpy(), out=pairs)
    out.view(torch.uint8).view(-1).copy_(torch.from_numpy(pairs))  # keeps the low byte: first | second << 4


def to_float8(x: Tensor, scales: Tensor, out: Tensor, *, cut: bool) -> None:
    """Round `x`, weights that were divided by `scales`, to `out` float8_e4m3fn, ties to even; magnitudes above 448
    become 448. `cut`: the scales may be smaller than the largest magnitude / 448. `x` may be changed."""
    # otherwise a quotient is above 448 by no more than the rounding of a normal scale, and rounds to 448 by itself
    if cut or float(scales.abs().min()) < torch.finfo(scales.dtype).tiny:
        x.clamp_(-E4M3_MAX, E4M3_MAX)
    out.copy_(x)
