"""Keep glibc from hoarding: worker threads share one heap, and large blocks go back to the system when freed."""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8


def lean_malloc() -> None:
    """One arena, and mmap for blocks from 1 MiB on. Does nothing where the C library is not glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_MMAP_THRESHOLD, 1 << 20)
