"""Memory that the layer stream takes and gives back: activations in RAM or a file, freed layers to the system."""

from __future__ import annotations

import ctypes
import math
import os
import tempfile

import torch
from torch import Tensor

from moeconv.errors import OutputError, escape

MAPPED = 1 << 24  # blocks from here on go back to the system at once; below, an expert is decoded in the same pages


def allocate(shape: tuple[int, ...], dtype: torch.dtype, limit: int | None) -> Tensor:
    """Room for activations: memory, or beyond `limit` bytes a file in the temporary directory, gone with the tensor.

    Raises OutputError when the disk has no room for it.
    """
    if limit is None or math.prod(shape) * dtype.itemsize <= limit:
        return torch.empty(shape, dtype=dtype)
    with tempfile.NamedTemporaryFile(prefix="moeconv-activations-") as file:
        try:
            # Reserved now: a full disk behind a mapping would end the process with a signal.
            os.posix_fallocate(file.fileno(), 0, math.prod(shape) * dtype.itemsize)
        except OSError as error:
            raise OutputError(
                f"no room for {math.prod(shape) * dtype.itemsize} bytes of activations in {escape(file.name)}: "
                f"{error.strerror}",
                hint="Set TMPDIR to a larger disk, pass fewer --tokens, or a larger --max-memory.",
            ) from None
        return torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype).view(shape)


def release_memory() -> None:
    """Give freed memory back to the system: glibc keeps it otherwise, twice a layer's size in the end."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
