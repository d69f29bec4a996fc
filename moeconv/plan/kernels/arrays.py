"""Raw bytes <-> numpy arrays for the four float dtypes. numpy has no bfloat16, so its bits are converted here."""

from __future__ import annotations

import numpy as np

_NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
# the mask of the exponent bits, which are all set in infinities and NaN
_EXPONENT: dict[str, tuple[type[np.unsignedinteger], int]] = {
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
    "F32": (np.uint32, 0x7F800000),
    "F64": (np.uint64, 0x7FF0000000000000),
}


def to_float32(data: bytes | bytearray | memoryview, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """A float32 array (float64 stays float64) of raw little-endian bytes."""
    if dtype == "BF16":
        bits = np.frombuffer(data, np.uint16).astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32).reshape(shape)
    array = np.frombuffer(data, _NUMPY[dtype]).reshape(shape)
    return array.astype(np.float32) if dtype == "F16" else array.copy()


def raw_bytes(array: np.ndarray) -> memoryview:
    """The array's bytes in row-major order; no copy for a contiguous array."""
    return np.ascontiguousarray(array).reshape(-1).data.cast("B")  # flat: a memoryview of shape (0, n) cannot be cast


def from_float(array: np.ndarray, dtype: str) -> memoryview:
    """Raw bytes of a float array in `dtype`, rounded to nearest even."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
        rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
        if nan.any():
            rounded[nan] = (bits[nan] >> 16) | 0x40
        return raw_bytes(rounded)
    with np.errstate(over="ignore"):
        return raw_bytes(np.ascontiguousarray(array, _NUMPY[dtype]))


def all_finite(data: bytes | bytearray | memoryview, dtype: str, *, block: int = 1 << 17) -> bool:
    """Whether no element is infinite or NaN. Works in blocks that stay in the processor's cache."""
    kind, exponent = _EXPONENT[dtype]
    bits = np.frombuffer(data, kind)
    scratch: np.ndarray = np.empty(min(block, len(bits)), kind)
    for start in range(0, len(bits), block):
        part = bits[start : start + block]
        masked = np.bitwise_and(part, kind(exponent), out=scratch[: len(part)])
        if int(masked.max(initial=0)) == exponent:
            return False
    return True
