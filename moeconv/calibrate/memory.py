"""Memory that the layer stream takes and gives back: activations in RAM or a file, freed layers to the system."""

from __future__ import annotations

import ctypes
import math
import tempfile

import torch
from torch import Tensor


def allocate(shape: tuple[int, ...], dtype: torch.dtype, limit: int | None) -> Tensor:
    """Room for activations: memory, or beyond `limit` bytes a file in the temporary directory, gone with the tensor."""
    if limit is None or math.prod(shape) * dtype.itemsize <= limit:
        return torch.empty(shape, dtype=dtype)
    with tempfile.NamedTemporaryFile(prefix="moeconv-activations-") as file:
        return torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype).view(shape)


def release_memory() -> None:
    """Give freed memory back to the system: glibc keeps it otherwise, twice a layer's size in the end."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
