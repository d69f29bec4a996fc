"""ggml's block formats. Q8_0 and Q4_0 are encoded by the `gguf` package; Q4_K, which it only decodes, here.

Q4_K: super-blocks of 256 = 8 blocks of 32; w = d * scale * q - dmin * min with q in 0..15, scale and min of 6 bits,
d and dmin float16: 4.5 bits a weight (ggml's block_q4_K).
"""

from __future__ import annotations

import numpy as np

from moeconv.errors import InputError

_ROWS = 1 << 16  # elements in float32 at a time: what stays in cache
_STEPS = 21  # inverse scales that are tried, as many as ggml's make_qkx2_quants tries


def encode(weight: np.ndarray, dtype: str) -> bytes:
    """`weight` float32 [rows, columns] -> the bytes of Q8_0, Q4_0 or Q4_K, row after row.

    Raises InputError for NaN or infinity in the weight."""
    if not np.isfinite(weight).all():
        raise InputError("NaN or infinity cannot be quantized", hint="Repair or replace the source checkpoint.")
    step = max(1, _ROWS // max(1, weight.shape[1]))
    return b"".join(_encode(weight[first : first + step], dtype) for first in range(0, len(weight), step))


def _encode(rows: np.ndarray, dtype: str) -> bytes:
    if dtype == "Q4_K":
        return encode_q4_k(rows).tobytes()
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    return quantize(rows, GGMLQuantizationType[dtype]).tobytes()


def decode(data: bytes | memoryview, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 weight behind `encode`'s bytes, by the `gguf` package."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[dtype]
    elements, size = GGML_QUANT_SIZES[kind]
    octets = np.frombuffer(data, np.uint8).reshape(-1, shape[-1] // elements * size)
    return dequantize(octets, kind).reshape(shape)


def encode_q4_k(weight: np.ndarray) -> np.ndarray:
    """float32 [rows, columns], columns of whole 256s -> uint8 [rows * columns / 256, 144].

    Scale and minimum of every block of 32 are searched for the least squared error (as ggml's make_qkx2_quants, without
    its weighting), then rounded to 6 bits, and the codes chosen for what they were rounded to."""
    x = weight.reshape(-1, 8, 32)
    scale, offset = _search(x)
    if max(scale.max(initial=0), offset.max(initial=0)) > 63 * 65504:
        raise InputError("its values are too large for Q4_K", hint="Use another scheme.")
    d = (scale.max(-1, keepdims=True) / 63).astype(np.float16).astype(np.float32)  # [n, 1]
    dmin = (offset.max(-1, keepdims=True) / 63).astype(np.float16).astype(np.float32)
    scales = np.rint(_divide(scale, d)).clip(0, 63).astype(np.uint8)
    mins = np.rint(_divide(offset, dmin)).clip(0, 63).astype(np.uint8)
    step, low = (d * scales)[..., None], (dmin * mins)[..., None]
    codes = np.rint(_divide(x + low, step)).clip(0, 15).astype(np.uint8)
    blocks: np.ndarray = np.empty((len(x), 144), np.uint8)
    blocks[:, 0:2] = d.astype(np.float16).view(np.uint8)
    blocks[:, 2:4] = dmin.astype(np.float16).view(np.uint8)
    blocks[:, 4:8] = (scales[:, :4] & 63) | (scales[:, 4:] >> 4 << 6)
    blocks[:, 8:12] = (mins[:, :4] & 63) | (mins[:, 4:] >> 4 << 6)
    blocks[:, 12:16] = (scales[:, 4:] & 15) | (mins[:, 4:] & 15) << 4
    pairs = codes.reshape(-1, 4, 2, 32)  # a byte holds a value of an even block below one of the odd block after it
    blocks[:, 16:] = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)
    return blocks


def _search(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(scale, -minimum) [n, 8], neither negative, of least squared error for x [n, 8, 32] and codes 0..15."""
    low = np.minimum(x.min(-1), 0)  # [n, 8]
    width = x.max(-1) - low
    unit = _divide(x - low[..., None], np.maximum(width, 0)[..., None])  # 0..1
    # what a code's least squares needs, taken in units of the block's width so that float32 does
    y = unit - _divide(-low, width)[..., None]
    total, energy, count = y.sum(-1), np.einsum("nbi,nbi->nb", y, y), np.float32(x.shape[-1])
    best_scale, best_offset = np.full_like(low, 1 / 15), _divide(-low, width)
    least = np.full_like(low, np.inf)
    codes = np.empty_like(x)
    for i in range(_STEPS):
        np.multiply(unit, np.float32(15 - 1 + 0.1 * i), out=codes)
        np.clip(np.rint(codes, out=codes), 0, 15, out=codes)
        # least squares for y = scale * code - offset, offset at least 0
        c, cc, cy = codes.sum(-1), np.einsum("nbi,nbi->nb", codes, codes), np.einsum("nbi,nbi->nb", codes, y)
        determinant = count * cc - c * c
        scale, offset = _divide(count * cy - c * total, determinant), _divide(c * cy - cc * total, determinant)
        alone = offset < 0
        scale, offset = np.where(alone, _divide(cy, cc), scale), np.where(alone, 0, offset)
        error = energy + scale * (scale * cc - 2 * (cy + offset * c)) + offset * (2 * total + count * offset)
        better = (error < least) & (scale > 0)
        least = np.where(better, error, least)
        best_scale, best_offset = np.where(better, scale, best_scale), np.where(better, offset, best_offset)
    return best_scale * width, np.where(width > 0, best_offset * width, -low)


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape), a.dtype), where=b != 0)
