"""What the benchmarks of speed share: whole processes timed from start to end, their memory, and the page cache."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any


def forget(*folders: Path) -> None:
    """Take every file of the folders out of the page cache."""
    os.sync()
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                fd = os.open(path, os.O_RDONLY)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)


def warm(folder: Path) -> None:
    """Read every file once, so that the page cache holds it."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                while file.read(1 << 22):
                    pass


def timed(words: list[Any], out: Path) -> dict[str, float]:
    """Wall and processor seconds of a process from start to end, and the most memory that it held."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    began, before = time.monotonic(), _spent()
    process = subprocess.Popen([str(w) for w in words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0
    assert process.stderr is not None
    os.set_blocking(process.stderr.fileno(), False)
    said = b""
    while process.poll() is None:
        peak = max(peak, _high_water(process.pid))
        said += process.stderr.read() or b""
        time.sleep(0.02)
    seconds = time.monotonic() - began
    if process.returncode:
        said += process.stderr.read() or b""
        raise SystemExit(f"{words}: exit {process.returncode}\n{said.decode()[-2000:]}")
    return {"seconds": seconds, "cpu": _spent() - before, "peak_mb": peak / 1e6}


def _spent() -> float:
    """Processor seconds of the children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _high_water(pid: int) -> int:
    with contextlib.suppress(OSError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def copy_words(source: Path, out: Path) -> list[Any]:
    """cp and an fsync of every file and of the folder."""
    return ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/* "$1"', source, out]


def median(values: list[dict[str, float]]) -> dict[str, float]:
    middle = sorted(values, key=lambda v: v["seconds"])[len(values) // 2]
    return {"seconds": round(middle["seconds"], 2), "peak_mb": round(max(v["peak_mb"] for v in values))}
