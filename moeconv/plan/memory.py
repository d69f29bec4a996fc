"""Memory: what a plan will take, what is free, and how the C library gives memory back.

Worker threads share one heap, and large blocks go back to the system when they are freed.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path

from moeconv.plan.kernels import needs_torch
from moeconv.plan.plan import Plan

_PROCESS, _TORCH = 60_000_000, 200_000_000  # a process with its write buffers, and torch in it

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def configure_malloc(mapped: int = 1 << 22) -> None:
    """Sets glibc to one arena, to mmap for blocks of at least `mapped` bytes, and to keep at least 32 MiB of freed
    memory. With less, every temporary buffer would cause page faults, which take half of the processor time of a
    quantize. Does nothing where the C library is not glibc."""
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_MMAP_THRESHOLD, mapped)
    mallopt(_M_TRIM_THRESHOLD, max(1 << 25, 4 * mapped))


def memory_bytes(plan: Plan, *, jobs: int) -> int:
    """About the most memory that applying a plan takes, in bytes: the process, and per worker one computed item with
    its temporary buffers."""
    torch = any(needs_torch(item.kernel, item.params) for item in plan.items())
    return _PROCESS + torch * _TORCH + jobs * worker_bytes(plan)


def worker_bytes(plan: Plan) -> int:
    """About the most memory that one worker takes, in bytes: a computed item with its temporary buffers."""
    return 2 * plan.largest_item


def free_memory(root: Path = Path("/")) -> int:
    """The bytes that this process may still take: what Linux reports as available, or less where a control group (of a
    container or a batch system) or `ulimit -v` allows less. A limit that cannot be read counts as none."""
    return min([*_available(root), *_of_groups(root), *_of_limits(root)], default=1 << 62)


def _available(root: Path) -> Iterator[int]:
    yield from (kilobytes * 1024 for kilobytes in _numbers(root / "proc/meminfo", "MemAvailable:"))


def _of_groups(root: Path) -> Iterator[int]:
    """The bytes left in this process's control groups and their parents. File pages in them count as free, since the
    kernel can reclaim them."""
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            old = "memory" in controllers.split(",")
            if not (old or controllers == ""):
                continue
            top = root / "sys/fs/cgroup" / ("memory" if old else "")
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if old else ("memory.max", "memory.current")
            inside = top / path.lstrip("/")
            for group in (inside, *inside.parents):
                with contextlib.suppress(OSError, ValueError):
                    limit, used = (int((group / name).read_text()) for name in names)
                    yield limit - used + sum(_numbers(group / "memory.stat", "inactive_file", "active_file"))
                if group == top:
                    break


def _of_limits(root: Path) -> Iterator[int]:
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        yield from (limit - kilobytes * 1024 for kilobytes in _numbers(root / "proc/self/status", "VmSize:"))


def _numbers(path: Path, *words: str) -> list[int]:
    """The numbers in the lines of a file that begin with one of these words."""
    with contextlib.suppress(OSError, ValueError):
        lines = [line.split() for line in path.read_text().splitlines()]
        return [int(line[1]) for line in lines if len(line) > 1 and line[0] in words]
    return []


def configure_collector() -> None:
    """Makes the garbage collector look for cycles every 100,000 objects instead of every 700, and never at exit:
    headers, plans and the modules of torch are many objects without cycles."""
    gc.set_threshold(100_000, 50, 1000)
    atexit.register(gc.freeze)
