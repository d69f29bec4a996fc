"""What every packing shares: block sizes that stay in cache, checks of a weight, the error of a packed one."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from moeconv.errors import InputError, UsageError

# Elements a pass works on: float32 buffers of 1 MB, which stay in cache and beside which the fixed cost of some thirty
# torch calls (50 us a block) is small. Measured at 4096 x 4096: 1 << 16 is 1.7 times slower, 1 << 20 slower for NF4.
BLOCK = 1 << 18

# Adding 1.5 * 2^23 to a float32 of small magnitude rounds it to an integer, half to even like torch.round, and leaves
# that integer in the low mantissa bits: rounding and conversion in one pass over memory.
ROUND = 12582912.0

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def relative_rms(original: Tensor, decoded: Tensor) -> float:
    """sqrt(sum (original - decoded)^2 / sum original^2), accumulated in float64; 0.0 for two zero tensors."""
    if original.shape != decoded.shape:
        raise UsageError(
            f"shapes differ: {tuple(original.shape)} and {tuple(decoded.shape)}", hint="Compare equal shapes."
        )
    error = energy = 0.0
    left, right = original.detach().reshape(-1), decoded.detach().reshape(-1)
    for start in range(0, left.numel(), BLOCK):
        x = left[start : start + BLOCK].double()
        energy += float(x.dot(x))
        x.sub_(right[start : start + BLOCK].double())
        error += float(x.dot(x))
    if energy == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return math.sqrt(error / energy)


def check_float(weight: Tensor) -> None:
    """Raises UsageError for a weight that is not of a float dtype that is quantized."""
    if weight.dtype not in FLOATS:
        raise UsageError(
            f"a weight of dtype {weight.dtype} cannot be quantized", hint="Pass bfloat16, float16 or float32 weights."
        )


def check_matrix(weight: Tensor) -> None:
    """Raises UsageError for a weight that is not a float matrix."""
    check_float(weight)
    if weight.ndim != 2:
        raise UsageError(
            f"a weight of shape {tuple(weight.shape)} is not a matrix",
            hint="Quantize one projection [out, in] at a time.",
        )


def check_finite(scales: Tensor) -> None:
    """NaN and infinity in a weight reach its scale, so the small tensor is enough to look at."""
    if not torch.isfinite(scales).all():
        raise InputError(
            "a weight holds NaN or infinity and cannot be quantized", hint="Repair or replace the source checkpoint."
        )


class RowBuffers:
    """The scratch memory of one call, allocated once: a block of rows in float32, its magnitudes, bytes, byte pairs."""

    def __init__(self, rows: int, columns: int) -> None:
        self.blocks = list(row_blocks(rows, columns))
        size = columns * max((stop - start for start, stop in self.blocks), default=0)
        self.columns = columns
        self.values = torch.empty(size)
        self.magnitudes = torch.empty(size)
        self.bytes_ = torch.empty(size, dtype=torch.uint8)
        self.pairs = torch.empty(size // 2, dtype=torch.int16)

    def load(self, weight: Tensor, start: int, stop: int) -> Tensor:
        return self.values[: (stop - start) * self.columns].view(-1, self.columns).copy_(weight[start:stop])


def row_blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """(first row, row after the last) of blocks of about BLOCK elements."""
    step = max(1, BLOCK // max(1, columns))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


WORDS = {torch.float32: torch.int64, torch.bfloat16: torch.int32, torch.float16: torch.int32}  # each holds two


def pairs_of(values: Tensor) -> Tensor:
    """Words of two values each, for codes that are joined in twos, the lower one first: [n] -> [n * n]."""
    n = len(values)
    return torch.stack([values.repeat(n), values.repeat_interleave(n)], -1).view(WORDS[values.dtype]).flatten()


def look_up(codes: Tensor, words: Tensor, out: Tensor) -> None:
    """words[codes] into the memory of `out`, in blocks that stay in cache."""
    into = out.view(-1).view(words.dtype)
    for start in range(0, codes.numel(), BLOCK):
        part = codes[start : start + BLOCK].int()
        torch.index_select(words, 0, part, out=into[start : start + part.numel()])
