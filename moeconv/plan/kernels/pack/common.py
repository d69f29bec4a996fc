"""Shared by all packings: block sizes that stay in the cache, checks of a weight, and the error of a packed weight."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moeconv.errors import InputError, UsageError

# Elements per pass: float32 buffers of 1 MB stay in the cache, and the fixed cost of about thirty torch calls (50 us
# per block) is small beside the work. Measured at 4096 x 4096: 1 << 16 is 1.7 times slower, and 1 << 20 is slower for
# NF4.
BLOCK = 1 << 18

# Adding 1.5 * 2^23 to a float32 of small magnitude rounds it to an integer, half to even like torch.round, and puts
# that integer into the low mantissa bits. This rounds and converts in one pass over memory.
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
    """Raises UsageError for a weight whose dtype cannot be quantized."""
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
    """Raises InputError for scales that are not finite. NaN and infinity in a weight reach its scale, so that checking
    the small tensor is enough."""
    if not torch.isfinite(scales).all():
        raise InputError(
            "a weight contains NaN or infinity and cannot be quantized", hint="Repair or replace the source checkpoint."
        )


class Scratch(threading.local):
    """Temporary memory of each thread, kept from block to block and call to call: the system clears new pages, which
    costs as much as a few passes over them. A buffer is valid until the next one of the same name and dtype."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised tensor of that shape. Buffers of more than BLOCK elements are not kept."""
        size = math.prod(shape)
        kept = self._kept.get((name, dtype))
        if kept is None or len(kept) < size:
            kept = torch.empty(size, dtype=dtype)
            if size <= BLOCK:
                self._kept[name, dtype] = kept
        return kept[:size].view(*shape)


SCRATCH = Scratch()


class RowBuffers:
    """The temporary buffers of one call: a block of rows in float32, its magnitudes, bytes, and pairs of bytes."""

    def __init__(self, rows: int, columns: int) -> None:
        self.blocks = list(row_blocks(rows, columns))
        size = columns * max((stop - start for start, stop in self.blocks), default=0)
        self.columns = columns
        self.values, self.magnitudes = SCRATCH("values", (size,)), SCRATCH("magnitudes", (size,))
        self.bytes_ = SCRATCH("bytes", (size,), torch.uint8)
        self.pairs = SCRATCH("pairs", (size // 2,), torch.int16)

    def load(self, weight: Tensor, start: int, stop: int) -> Tensor:
        return self.values[: (stop - start) * self.columns].view(-1, self.columns).copy_(weight[start:stop])


def row_blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """(first row, row after the last one) of blocks of about BLOCK elements."""
    step = max(1, BLOCK // max(1, columns))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


WORDS = {
    torch.float32: torch.int64,
    torch.bfloat16: torch.int32,
    torch.float16: torch.int32,
}  # an integer that holds two values


def pairs_of(values: Tensor) -> Tensor:
    """Words that hold two values each, for pairs of codes with the low code first: [n] -> [n * n]."""
    n = len(values)
    return torch.stack([values.repeat(n), values.repeat_interleave(n)], -1).view(WORDS[values.dtype]).flatten()


def look_up(codes: Tensor, words: Tensor, out: Tensor) -> None:
    """Write words[codes] to the memory of `out`, in blocks that stay in the cache."""
    into = out.view(-1).view(words.dtype)
    for start in range(0, codes.numel(), BLOCK):
        part = codes[start : start + BLOCK].int()
        torch.index_select(words, 0, part, out=into[start : start + part.numel()])
