"""The output directory: built in a staging directory beside OUT, committed by one rename, resumable until then.

.OUT.moeconv/lock                one whole run, or any number of parts of one plan
.OUT.moeconv/KEY/out/            the files as they will be in OUT
.OUT.moeconv/KEY/done/SHARD.json the journal: written after the shard is safe on disk
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
    """The journal's record of a shard: what it must hash to, and the checksum of the source bytes behind it."""

    sha256: str
    bytes: int
    source_crc: int


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Linux's renameat2; False where the kernel or file system does not have it. Raises OSError on refusal."""
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
    """OUT while it is being made. Use as a context manager: it holds the lock.

    `key` names the exact work (plan, source state, version): only finished shards of the same key are found again.
    """

    def __init__(
        self, out: Path, *, key: str, overwrite: bool = False, shared: bool = False, lock: StagingLock | None = None
    ) -> None:
        """`lock`: the hold on the staging directory that the caller has, and keeps."""
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
        """True when this process may write the shard: no other part is doing so now."""
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
        """Serialises commits of parts. False when another part has committed already."""
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
        """The journal's record of a shard, or None when the shard is not whole on disk."""
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
        """Journal a shard whose bytes are already safe in `staged`."""
        sync_directory(self.staged)
        replace_file(self._done / f"{name}.json", json.dumps(asdict(record)).encode())

    def forget(self, name: str) -> None:
        """Strike a shard from the journal: its bytes or its source are no longer what was recorded."""
        with output_errors(self.out):
            (self._done / f"{name}.json").unlink(missing_ok=True)

    # -- the end -------------------------------------------------------------------------------------------------

    def commit(self) -> None:
        """Make `staged` the OUT in one rename, then clear the staging directory. Raises OutputError if OUT appeared
        meanwhile, or now contains files that a swap would lose.

        A reader sees the old OUT or the new one, whole. An exchange by renameat2 keeps the old directory until the new
        one is in place; it then lies in the staging directory, which is removed. Where the file system lacks renameat2,
        two renames do the same, with a moment without OUT between them.
        """
        with output_errors(self.out):
            sync_directory(self.staged)
            if self.out.exists() and self.overwrite:
                check_swap(self.out)  # again: this run may have taken hours
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
        """Whether other parts have committed while this one was starting, so that what it staged is of no use."""
        return self.shared and not self.overwrite and self.out.exists()

    def discard(self) -> None:
        """Remove what was staged for this work, which running it again could not complete. While other parts are at
        work in it, it stays."""
        if self._lock.alone():
            shutil.rmtree(self.work, ignore_errors=True)
            self._lock.remove_empty()

    def free_bytes(self) -> int:
        """Bytes free where OUT will lie."""
        with output_errors(self.out):
            return shutil.disk_usage(self.out.parent).free
