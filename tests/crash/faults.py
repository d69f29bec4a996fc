"""Counts what a process does to the disk, and at the chosen operation kills it, tears a write, cuts the power or fails.

Every operation is counted before it happens. "power" also takes back what was written and never synchronised.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moeconv.checkpoint import output

CALLS = ("open", "pwrite", "write", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir")
MODES = ("kill", "torn", "power", "full")


class Faults:
    """A context in which disk operation number `at` (from 0; None for never) fails in the way of `mode`."""

    def __init__(
        self, *, at: int | None = None, mode: str = "kill", folder: Path | None = None, error: int = errno.ENOSPC
    ) -> None:
        self.at, self.mode, self.folder, self.error = at, mode, folder, error
        self.count = 0
        self.names: list[str] = []
        self._unsynced: set[int] = set()  # inodes
        self._lock = threading.RLock()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Faults:
        for name in CALLS:
            self._replace(os, name, self._counted(name, getattr(os, name)))
        self._replace(output, "_renameat2", self._counted("renameat2", output._renameat2))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _replace(self, owner: Any, name: str, new: Any) -> None:
        old = getattr(owner, name)
        setattr(owner, name, new)
        self._stack.callback(setattr, owner, name, old)

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            if name == "open" and not (len(args) > 1 and args[1] & os.O_CREAT):
                return real(*args, **keywords)
            with self._lock:
                number = self.count
                self.count += 1
                self.names.append(name)
                if number == self.at:
                    self._fail(name, real, args)
                result = real(*args, **keywords)
                if name in ("pwrite", "write"):
                    self._unsynced.add(os.fstat(args[0]).st_ino)
                elif name == "fsync":
                    self._unsynced.discard(os.fstat(args[0]).st_ino)
                return result

        return call

    def _fail(self, name: str, real: Callable[..., Any], args: tuple[Any, ...]) -> None:
        if self.mode == "full":
            raise OSError(self.error, os.strerror(self.error))
        if self.mode == "torn" and name in ("pwrite", "write"):
            with contextlib.suppress(OSError):  # direct I/O takes whole blocks of aligned memory only
                half = len(args[1]) // 2
                real(args[0], args[1][: half - half % 4096 if half >= 4096 else half], *args[2:])
        if self.mode == "power" and self.folder is not None:
            for file in _files(self.folder):
                if os.stat(file).st_ino in self._unsynced:
                    os.truncate(file, os.path.getsize(file) // 2)
        os.kill(os.getpid(), signal.SIGKILL)


def _files(folder: Path) -> Iterator[str]:
    for place, _, names in os.walk(folder):
        yield from (os.path.join(place, name) for name in names)
