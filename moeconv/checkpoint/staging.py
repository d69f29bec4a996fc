"""The hidden directory `.OUT.moeconv` beside OUT: its locks, and the measurements that are made there before a plan.

.OUT.moeconv/lock                      held by one whole run (exclusive) or by all parts of the same run (shared)
.OUT.moeconv/measured-KEY/lock         held by the process that measures; the kernel releases it if that is killed
.OUT.moeconv/measured-KEY/NAME/        a complete measurement, with its figures in figures.json
.OUT.moeconv/measured-KEY/NAME.begun/  a measurement that is not complete
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeconv.checkpoint.writer import output_errors, replace_file, sync_directory
from moeconv.errors import Interrupted, LimitError, OutputError, escape

if TYPE_CHECKING:
    import numpy as np

FIGURES = "figures.json"
_STEP, _HEARTBEAT = 0.2, 30.0  # seconds between attempts to lock, and between messages about waiting


def staging_of(out: Path) -> Path:
    """The directory in which OUT is built: `.NAME.moeconv` beside it."""
    return out.parent / f".{out.name}.moeconv"


class StagingLock:
    """The lock on OUT's staging directory: exclusive, or `shared` with the other parts of the same run."""

    def __init__(self, out: Path, *, shared: bool = False) -> None:
        self.out, self.shared, self.root = out, shared, staging_of(out)
        self._fd = -1

    def acquire(self) -> None:
        """Take the lock without waiting. Raises OutputError if another run is writing the same OUT."""
        mode = (fcntl.LOCK_SH if self.shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
        path = self.root / "lock"
        while True:
            with output_errors(self.out):
                self.root.mkdir(exist_ok=True)
                try:
                    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                except FileNotFoundError:
                    continue  # another run has committed and removed the directory meanwhile
            try:
                fcntl.flock(fd, mode)
            except OSError:
                os.close(fd)
                raise OutputError(
                    f"another moeconv run is writing {escape(self.out)}",
                    hint="Wait for it, or give this run another OUT; --part i/n lets runs share one.",
                ) from None
            if _still_at(fd, path):
                self._fd = fd
                return
            os.close(fd)

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)  # closing the descriptor releases the lock
            self._fd = -1

    def alone(self) -> bool:
        """Whether no other process holds the lock. If so, none can take it until this one is released."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def remove_empty(self) -> None:
        """Remove the directory if only the lock file is left in it. Call this only after `alone` has returned true."""
        with contextlib.suppress(OSError):
            if set(os.listdir(self.root)) <= {"lock"}:
                (self.root / "lock").unlink(missing_ok=True)
                self.root.rmdir()


class Measured:
    """What a command measures before it can plan; measured once for all parts, and kept for a repeated run.

    `key` returns a hash of everything that the measurement depends on (source, parameters, data); it is called only if
    something is measured. As a context manager, this holds the lock of the staging directory (`lock`, which the
    OutputDirectory uses afterwards). Complete measurements are kept if the run is interrupted or the disk is full; any
    other error removes them.
    """

    def __init__(
        self, out: Path, *, key: Callable[[], str], shared: bool = False, note: Callable[[str], None] | None = None
    ) -> None:
        self.lock = StagingLock(out, shared=shared)
        self._key = key
        self._note = note or (lambda _text: None)
        self._resumes: set[str] = set()

    @cached_property
    def folder(self) -> Path:
        return self.lock.root / f"measured-{self._key()[:32]}"

    def __enter__(self) -> Measured:
        self.lock.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is not None and self.lock.alone():
                if "folder" in self.__dict__:  # the cached property exists only if something was measured
                    self._clear(keep=issubclass(kind, Interrupted | OutputError | LimitError))
                self.lock.remove_empty()
        finally:
            self.lock.release()

    def once(self, name: str, make: Callable[[Path], Any], *, resumes: bool = False) -> tuple[Path, Any]:
        """(the folder that `make` filled, the JSON value that it returned); only one process calls `make`, once.

        If another part is calling it, this waits for the result. With `resumes`, the next call of `make` gets the
        folder as a killed call left it.
        """
        if resumes:
            self._resumes.add(name)
        made = self.folder / name
        with self._measuring():
            if not (made / FIGURES).is_file():
                begun = self.folder / f"{name}.begun"
                with output_errors(begun):
                    if not resumes:
                        shutil.rmtree(begun, ignore_errors=True)
                    begun.mkdir(exist_ok=True)
                text = json.dumps(make(begun), default=_plain)
                replace_file(begun / FIGURES, text.encode())
                with output_errors(made):
                    os.rename(begun, made)
                sync_directory(self.folder)
        return made, json.loads((made / FIGURES).read_bytes())

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        """Hold the lock under which only one process measures; wait for it if necessary."""
        path, last_note = self.folder / "lock", -_HEARTBEAT
        while True:
            with output_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                try:
                    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                except FileNotFoundError:
                    continue  # the other parts have finished and removed the folder meanwhile
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _still_at(fd, path):
                    break
            except OSError:
                if time.monotonic() - last_note >= _HEARTBEAT:
                    last_note = time.monotonic()
                    self._note("another part is measuring: waiting for it")
                time.sleep(_STEP)
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
        try:
            yield
        finally:
            os.close(fd)

    def _clear(self, *, keep: bool) -> None:
        """Remove the measurements that a repeated run cannot use; without `keep`, remove all of them."""
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.folder):
                whole = not entry.name.endswith(".begun") or entry.name.removesuffix(".begun") in self._resumes
                if entry.is_dir() and not (keep and whole and os.listdir(entry.path)):
                    shutil.rmtree(entry.path, ignore_errors=True)
            if set(os.listdir(self.folder)) <= {"lock"}:
                shutil.rmtree(self.folder, ignore_errors=True)


def _still_at(fd: int, path: Path) -> bool:
    """Whether an open file is still the one at `path`, since another run may have removed or replaced it."""
    try:
        return os.fstat(fd).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def _plain(value: np.ndarray | np.generic) -> object:
    """A number or array of numpy as plain JSON values."""
    plain: object = value.tolist()
    return plain
