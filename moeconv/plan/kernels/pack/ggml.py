"""The block formats of ggml: Q8_0 and Q4_0 with the bytes of the `gguf` package, the others with searches of their own.

The `gguf` package decodes them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from moeconv.checkpoint.header import BLOCK_DTYPES
from moeconv.plan.kernels.pack import smallblocks, superblocks
from moeconv.plan.kernels.pack.common import BLOCK, check_finite, check_matrix
from moeconv.plan.kernels.pack.q4_k import encode_q4_k

_FLOOR = 1e-4  # the least importance of a column, in units of the mean
# trunc(x + copysign(_HALF, x)) rounds to the nearest integer, halves away from zero; with 0.5, 0.49999997 would be
# rounded up
_HALF = 0.49999997


def encode(weight: Tensor, dtype: str, importance: Tensor | None = None) -> memoryview:
    """Encode `weight` [rows, columns] of any float dtype to the bytes of a block format, row after row.

    `importance` [columns] has a weight for the squared error of each column, such as the mean square of the input that
    it multiplies; Q8_0 does not use it. Raises InputError for NaN or infinity in the weight, and for values that the
    format cannot hold.
    """
    check_matrix(weight)
    if dtype in _PLAIN and (importance is None or dtype not in _SEARCHED):
        return _encode_plain(weight, dtype)
    make, blocks, size = _SEARCHED[dtype]
    elements, nbytes = BLOCK_DTYPES[dtype]
    rows, columns = weight.shape
    out = torch.empty(rows * columns // elements, nbytes, dtype=torch.uint8)
    per_row = columns // elements
    step = max(1, 2 * BLOCK // max(1, columns))
    shares = None if importance is None else _shares(importance, blocks, size, step)
    for first in range(0, rows, step):
        part = weight[first : first + step]
        x = part.float().reshape(-1, blocks, size).permute(1, 2, 0).contiguous()
        w = None if shares is None else shares[..., : x.shape[2]]
        out[first * per_row : first * per_row + x.shape[2]] = make(x, w).t()
    return out.numpy().reshape(-1).data


def _shares(importance: Tensor, blocks: int, size: int, rows: int) -> Tensor:
    """The importance in the order of the blocks of `rows` rows [blocks, size, B], with a mean of 1. Columns whose
    inputs were always zero get a small one, so that their weights stay close to the source's."""
    mean = importance.mean()
    flat = torch.ones_like(importance) if not mean > 0 else (importance / mean).clamp_(min=_FLOOR)
    return flat.reshape(-1, blocks, size).permute(1, 2, 0).repeat(1, 1, rows).contiguous()


def _encode_plain(weight: Tensor, dtype: str) -> memoryview:
    """`encode` for the formats that work on blocks in their memory order."""
    make, size, nbytes = _PLAIN[dtype]
    out = torch.empty(weight.numel() // size, nbytes, dtype=torch.uint8)
    flat = weight.reshape(-1)
    step = 2 * BLOCK // size * size  # Q4_K calls torch twice as often as the packings of safetensors files
    work = torch.empty(4, min(step, len(flat)))  # allocated once, since new pages cost as much as a pass over them
    for first in range(0, len(flat), step):
        part = flat[first : first + step]
        blocks = work[0, : len(part)].copy_(part).view(-1, size)
        make(blocks, out[first // size : first // size + len(blocks)], work[1:])
    return out.numpy().reshape(-1).data


def decode(data: bytes | memoryview, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 weight that the `gguf` package decodes from the bytes of `encode`."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[dtype]
    elements, size = GGML_QUANT_SIZES[kind]
    octets = np.frombuffer(data, np.uint8).reshape(-1, shape[-1] // elements * size)
    decoded: np.ndarray = dequantize(octets, kind).reshape(shape)
    return decoded if decoded.flags.writeable else decoded.copy()  # floats are a view of the file


def _q8_0(x: Tensor, out: Tensor, work: Tensor) -> None:
    """float32 [n, 32] -> uint8 [n, 34]: a float16 scale, which is the largest magnitude / 127, and 32 codes of 8
    bits."""
    peak = torch.maximum(x.amax(1), x.amin(1).neg_()).abs_()  # no -0
    check_finite(peak)
    d = peak / 127
    inverse = torch.where(d > 0, d.reciprocal(), 0.0)
    levels, halves = work[:2, : x.numel()].view(2, -1, 32).unbind()
    torch.mul(x, inverse[:, None], out=levels)
    levels.add_(torch.copysign(halves.fill_(_HALF), levels, out=halves))
    out[:, :2] = d.half().view(torch.uint8).view(-1, 2)
    out[:, 2:].copy_(levels.to(torch.int32))  # truncates; the low byte is the level in two's complement


def _q4_0(x: Tensor, out: Tensor, _work: Tensor) -> None:
    """float32 [n, 32] -> uint8 [n, 18]: a float16 scale, which is the value of largest magnitude / -8, and 32 codes of
    4 bits. A byte holds a value of the first half in the low nibble, and one of the second half in the high nibble."""
    high, low = x.amax(1), x.amin(1)
    check_finite(high - low)
    peak = torch.where(high > -low, high, low)
    tied = (high == -low).nonzero().flatten()  # where both signs have the largest magnitude, the first value counts
    if len(tied):
        rows = x[tied]
        peak[tied] = rows.gather(1, (rows.abs() == high[tied, None]).int().argmax(1, keepdim=True))[:, 0]
    d = peak / -8
    inverse = torch.where(d != 0, d.reciprocal(), 0.0)
    codes = (x.double() * inverse.double()[:, None]).add_(8.5).to(torch.int32).clamp_(0, 15)
    out[:, :2] = d.half().view(torch.uint8).view(-1, 2)
    out[:, 2:].copy_(codes[:, :16] | codes[:, 16:] << 4)


# without importance; dtype -> (encoder of float32 [blocks, elements] into uint8 [blocks, bytes] with scratch memory,
# elements, bytes)
_PLAIN: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], None], int, int]] = {
    "Q8_0": (_q8_0, 32, 34),
    "Q4_0": (_q4_0, 32, 18),
    "Q4_K": (encode_q4_k, 256, 144),
}
# dtype -> (encoder of float32 [blocks, weights, n] and its importance to uint8 [bytes, n], blocks, weights per block)
_SEARCHED: dict[str, tuple[Callable[[Tensor, Tensor | None], Tensor], int, int]] = {
    "Q2_K": (superblocks.q2_k, 16, 16),
    "Q3_K": (superblocks.q3_k, 16, 16),
    "Q4_K": (superblocks.q4_k, 8, 32),
    "Q5_K": (superblocks.q5_k, 8, 32),
    "Q6_K": (superblocks.q6_k, 16, 16),
    "IQ4_XS": (superblocks.iq4_xs, 8, 32),
    "Q4_0": (smallblocks.q4_0, 1, 32),
    "Q4_1": (smallblocks.q4_1, 1, 32),
    "Q5_0": (smallblocks.q5_0, 1, 32),
    "Q5_1": (smallblocks.q5_1, 1, 32),
    "IQ4_NL": (smallblocks.iq4_nl, 1, 32),
    "MXFP4": (smallblocks.mxfp4, 1, 32),
}
