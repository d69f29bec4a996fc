"""The sizes of experts that transformers' default implementation of experts accepts.

grouped_mm wants every stride of its matrices to be a multiple of 16 bytes (torch 2.13, measured on every family); the
rows of an expert's matrices are as long as its width, or as the hidden size.
"""

from __future__ import annotations

from moeconv.checkpoint.header import DTYPE_BITS
from moeconv.families.spec import Family

STRIDES = {"grouped_mm": 16, "eager": 1}  # implementation of the experts -> bytes that divide every row


def multiple_of(family: Family, dtype: str) -> int:
    """The number that must divide hidden size and width of experts in `dtype` (as safetensors names it)."""
    return max(1, STRIDES[family.experts.implementation] * 8 // DTYPE_BITS[dtype])


def why_not(family: Family, *, width: int, hidden: int, dtype: str) -> str | None:
    """Why transformers' default implementation cannot compute experts of these sizes; None where it can."""
    unit = multiple_of(family, dtype)
    bad = [f"{name} {size}" for name, size in (("width", width), ("hidden size", hidden)) if size % unit]
    if not bad:
        return None
    return (
        f"experts of {' and '.join(bad)}: transformers computes experts with {family.experts.implementation} by "
        f"default, which takes only multiples of {unit} in {dtype}"
    )
