"""Memory: what a plan will take, and how glibc is kept from hoarding it.

Worker threads share one heap, and large blocks go back to the system when freed.
"""

from __future__ import annotations

import atexit
import gc

from moeconv.plan.kernels import needs_torch
from moeconv.plan.plan import Plan

_PROCESS, _TORCH = 60_000_000, 200_000_000  # a process with its write buffers, and torch in it

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def lean_malloc() -> None:
    """One arena, mmap for blocks from 4 MiB on, and at most 32 MiB kept free for the next ones: below that, every block
    of scratch would be page faults, half of a quantize's processor time. Does nothing where the C library is not glibc.
    """
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_MMAP_THRESHOLD, 1 << 22)
    mallopt(_M_TRIM_THRESHOLD, 1 << 25)


def memory_bytes(plan: Plan, *, jobs: int) -> int:
    """About the most memory that applying a plan takes: the process, and a computed item a worker with its scratch."""
    torch = any(needs_torch(item.kernel) for item in plan.items())
    return _PROCESS + torch * _TORCH + 2 * jobs * plan.largest_item


def calm_collector() -> None:
    """Look for cycles every 100,000 objects instead of every 700, and not once more at the end: headers, plans and
    torch's modules are many objects and no cycles."""
    gc.set_threshold(100_000, 50, 1000)
    atexit.register(gc.freeze)
