"""The hidden directory beside OUT, `.OUT.moeconv`: who may work in it, and what is measured there before a plan.

.OUT.moeconv/lock                 one whole run, or any number of parts of one work
.OUT.moeconv/measured-KEY/lock    the process that measures; the kernel frees it when that one is killed
.OUT.moeconv/measured-KEY/NAME/   an artifact that is whole, with its figures in figures.json
.OUT.moeconv/measured-KEY/NAME.begun/
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
_STEP, _HEARTBEAT = 0.2, 30.0  # seconds between two attempts to lock, and between two messages about waiting


def staging_of(out: Path) -> Path:
    """The directory in which OUT is built: `.NAME.moeconv` beside it."""
    return out.parent / f".{out.name}.moeconv"


class StagingLock:
    """The hold on OUT's staging directory: alone, or (`shared`) with the other parts of one work."""

    def __init__(self, out: Path, *, shared: bool = False) -> None:
        self.out, self.shared, self.root = out, shared, staging_of(out)
        self._fd = -1

    def acquire(self) -> None:
        """Raises OutputError when another run is at work for the same OUT."""
        mode = (fcntl.LOCK_SH if self.shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
        path = self.root / "lock"
        while True:
            with output_errors(self.out):
                self.root.mkdir(exist_ok=True)
                try:
                    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                except FileNotFoundError:
                    continue  # another run committed and removed the directory in between
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
            os.close(self._fd)  # the lock goes with the descriptor
            self._fd = -1

    def alone(self) -> bool:
        """Whether no other process works here. If so, none can begin until this lock is released."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def remove_empty(self) -> None:
        """Remove the directory when nothing is left in it but its lock. Only when `alone`."""
        with contextlib.suppress(OSError):
            if set(os.listdir(self.root)) <= {"lock"}:
                (self.root / "lock").unlink(missing_ok=True)
                self.root.rmdir()


class Measured:
    """What a command measures before it can plan, made once for all parts and all runs of the same work.

    `key` gives the work's name by its content (source, parameters, data), when something is measured. As a context
    manager it holds the staging directory's lock (`lock`, for the OutputDirectory that follows). What is whole stays
    when the run is stopped or the disk is full; another error removes it.
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
                if "folder" in self.__dict__:  # else nothing was measured
                    self._clear(keep=issubclass(kind, Interrupted | OutputError | LimitError))
                self.lock.remove_empty()
        finally:
            self.lock.release()

    def once(self, name: str, make: Callable[[Path], Any], *, resumes: bool = False) -> tuple[Path, Any]:
        """The folder that `make` filled, and the JSON value that it returned; made by one process and only once.

        While another part makes it, this waits. `resumes`: what a killed `make` left in its folder goes to the next.
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
        """Holds the lock under which one process measures."""
        path, last_note = self.folder / "lock", -_HEARTBEAT
        while True:
            with output_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                try:
                    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                except FileNotFoundError:
                    continue  # the other parts were done and removed it in between
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
        """Remove what another run of the same work cannot use; without `keep`, remove everything."""
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.folder):
                whole = not entry.name.endswith(".begun") or entry.name.removesuffix(".begun") in self._resumes
                if entry.is_dir() and not (keep and whole and os.listdir(entry.path)):
                    shutil.rmtree(entry.path, ignore_errors=True)
            if set(os.listdir(self.folder)) <= {"lock"}:
                shutil.rmtree(self.folder, ignore_errors=True)


def _still_at(fd: int, path: Path) -> bool:
    """Whether an open file is still the one at `path`: another run may have replaced it."""
    try:
        return os.fstat(fd).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def _plain(value: np.ndarray | np.generic) -> object:
    """A number or array of numpy as JSON has it."""
    plain: object = value.tolist()
    return plain
