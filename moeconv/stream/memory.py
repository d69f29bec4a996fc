"""The memory of the layer stream: activations in RAM or in a file, and the return of freed memory to the system."""

from __future__ import annotations

import ctypes
import math
import os
import tempfile

import torch
from torch import Tensor

from moeconv.errors import OutputError, escape

MAPPED = 1 << 22  # malloc returns larger blocks to the system at once; smaller ones reuse the same pages


def allocate(shape: tuple[int, ...], dtype: torch.dtype, limit: int | None) -> Tensor:
    """An uninitialised tensor for activations. If it takes more than `limit` bytes, it is mapped from an unnamed file
    in the temporary directory, which disappears with the tensor.

    Raises OutputError if the disk has no room for the file.
    """
    if limit is None or math.prod(shape) * dtype.itemsize <= limit:
        return torch.empty(shape, dtype=dtype)
    with tempfile.NamedTemporaryFile(prefix="moeconv-activations-") as file:
        try:
            # Reserve the space now: writing to a mapping on a full disk would end the process with a signal.
            os.posix_fallocate(file.fileno(), 0, math.prod(shape) * dtype.itemsize)
        except OSError as error:
            raise OutputError(
                f"the disk has no room for {math.prod(shape) * dtype.itemsize} bytes of activations in "
                f"{escape(file.name)}: "
                f"{error.strerror}",
                hint="Set TMPDIR to a directory on a larger disk, or pass fewer --tokens or a larger --max-memory.",
            ) from None
        return torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype).view(shape)


def release_memory() -> None:
    """Return freed memory to the system. Without this, glibc keeps up to twice the size of a layer."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
