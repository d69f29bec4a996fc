"""The output directory: built in a staging directory beside OUT, resumable, and finally committed by one rename.

.OUT.moeconv/lock                 held by one whole run (exclusive) or by all parts of one plan (shared)
.OUT.moeconv/KEY/out/             the files as they will be in OUT
.OUT.moeconv/KEY/done/SHARD.json  the journal: a record that is written once the shard is safe on disk
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from moeconv.checkpoint.staging import StagingLock
from moeconv.checkpoint.strictjson import read_json_object
from moeconv.checkpoint.target import check_swap
from moeconv.checkpoint.writer import output_errors, replace_file, sync_directory
from moeconv.errors import InputError, OutputError, escape

_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
_AT_FDCWD = -100


@dataclass(frozen=True)
class Finished:
    """The journal's record of a shard: its hash, its size, and the checksum of the source bytes it was made from."""

    sha256: str
    bytes: int
    source_crc: int


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Call Linux's renameat2. False if the kernel or file system lacks it; raises OSError if the call fails."""
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    if function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(code, os.strerror(code), str(target))


class OutputDirectory:
    """OUT while it is being built. As a context manager it holds the lock of the staging directory.

    `key` is a hash of everything that determines the output (plan, state of the source, version): a repeated run finds
    only finished shards with the same key.
    """

    def __init__(
        self, out: Path, *, key: str, overwrite: bool = False, shared: bool = False, lock: StagingLock | None = None
    ) -> None:
        """`lock` is the lock of the staging directory if the caller holds it already; it is not released here."""
        self.out = out
        self.overwrite = overwrite
        self.shared = shared
        self._lock, self._held = lock or StagingLock(out, shared=shared), lock is not None
        self.root = self._lock.root
        self.work = self.root / key[:32]
        self.staged = self.work / "out"
        self._done = self.work / "done"

    def __enter__(self) -> OutputDirectory:
        if not self._held:
            self._lock.acquire()
        try:
            with output_errors(self.out):
                self.staged.mkdir(parents=True, exist_ok=True)
                self._done.mkdir(exist_ok=True)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if not self._held:
            self._lock.release()

    @contextmanager
    def shard_lock(self, name: str) -> Iterator[bool]:
        """Yields whether this process may write the shard: false if another part is writing it now."""
        with output_errors(self.out):
            fd = os.open(self._done / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            yield True
        finally:
            os.close(fd)

    @contextmanager
    def commit_lock(self) -> Iterator[bool]:
        """Let only one part commit at a time. Yields false if another part has committed already."""
        with output_errors(self.out):
            try:
                fd = os.open(self._done / "commit.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:
                fd = -1
        if fd < 0:
            yield False
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield self.staged.is_dir()
        finally:
            os.close(fd)

    # -- the journal ---------------------------------------------------------------------------------------------

    def finished(self, name: str) -> Finished | None:
        """The journal's record of a shard; None if the shard is not complete on disk."""
        path = self._done / f"{name}.json"
        try:
            record = Finished(**read_json_object(path, what="journal"))
            status = (self.staged / name).lstat()
            if stat.S_ISREG(status.st_mode) and status.st_size == record.bytes:
                return record
        except (OSError, InputError, TypeError):
            pass
        return None

    def mark_finished(self, name: str, record: Finished) -> None:
        """Record a shard in the journal; its bytes must be safe on disk in `staged` already."""
        sync_directory(self.staged)
        replace_file(self._done / f"{name}.json", json.dumps(asdict(record)).encode())

    def forget(self, name: str) -> None:
        """Delete a shard's record from the journal, because its bytes or its source have changed since."""
        with output_errors(self.out):
            (self._done / f"{name}.json").unlink(missing_ok=True)

    # -- commit or discard ---------------------------------------------------------------------------------------

    def commit(self) -> None:
        """Move `staged` to OUT by one rename, then remove the staging directory.

        A reader sees either the complete old OUT or the complete new one: renameat2 exchanges the two directories, and
        the old one is then removed together with the staging directory. Without renameat2 in the kernel or file system,
        two renames do the same, with a moment without OUT between them. Raises OutputError if OUT has appeared since
        the run began, or now contains files that the replacement would delete.
        """
        with output_errors(self.out):
            sync_directory(self.staged)
            if self.out.exists() and self.overwrite:
                check_swap(self.out)  # again, since files may have been added during a run of hours
                if not _renameat2(self.staged, self.out, _RENAME_EXCHANGE):
                    old = self.work / "old"
                    os.rename(self.out, old)
                    os.rename(self.staged, self.out)
            else:
                try:
                    if not _renameat2(self.staged, self.out, _RENAME_NOREPLACE):
                        if self.out.exists():
                            raise FileExistsError(errno.EEXIST, "File exists")
                        os.rename(self.staged, self.out)
                except FileExistsError:
                    raise OutputError(
                        f"OUT {escape(self.out)} appeared while this run was writing",
                        hint="Move it away and run the same command again: finished shards are kept.",
                    ) from None
            sync_directory(self.out.parent)
        shutil.rmtree(self.root, ignore_errors=True)

    def superseded(self) -> bool:
        """Whether other parts have committed while this one was starting, so that its own files are not needed."""
        return self.shared and not self.overwrite and self.out.exists()

    def discard(self) -> None:
        """Remove the staged files of a failed run that could not be completed by running it again.

        They are kept while other parts are working on them.
        """
        if self._lock.alone():
            shutil.rmtree(self.work, ignore_errors=True)
            self._lock.remove_empty()

    def free_bytes(self) -> int:
        """Free bytes on the file system of OUT."""
        with output_errors(self.out):
            return shutil.disk_usage(self.out.parent).free
