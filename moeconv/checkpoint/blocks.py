"""Writing a large file past the page cache: aligned blocks go to the disk directly, hashed while they are written.

Direct writes do not push other files out of memory and leave nothing for fsync to wait for. Where the file system
has no direct I/O the same code writes through the cache.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ALIGN = 4096
BUFFER = 1 << 21
_MAX_STREAMS = 8


def create(path: Path) -> int:
    """Open a new file. What stands at `path` is unlinked, never truncated: it may be a link, or have a second name."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    # 0o666 so that the modes of what we write follow the umask
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def _open_direct(path: Path) -> int:
    """A second descriptor of an open file that bypasses the page cache, or -1 where there is no such thing."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT)
    except (OSError, AttributeError):
        return -1


class _Stream:
    """Bytes that follow each other in the file, gathered in an aligned buffer. `base` is the buffer's file offset."""

    def __init__(self, position: int) -> None:
        self.buffer = mmap.mmap(-1, BUFFER)
        self.view = memoryview(self.buffer)
        self.base = position - position % ALIGN
        self.first = position % ALIGN  # bytes at the buffer's start that are not ours
        self.fill = self.first

    @property
    def end(self) -> int:
        return self.base + self.fill


class BlockFile:
    """A file written at any offset, each byte once. Sequential runs (a few at a time) are what it is fast at."""

    def __init__(self, path: Path) -> None:
        self._fd = create(path)
        self._direct = _open_direct(path)
        self._streams: dict[int, _Stream] = {}
        self._edges: list[tuple[int, bytes]] = []
        self._digest = hashlib.sha256()
        self._hashed = 0
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="moeconv-hash")

    def write(self, position: int, data: memoryview) -> None:
        """Write bytes at `position`. They reach the disk by `finish` at the latest."""
        stream = self._streams.pop(position, None)
        if stream is None:
            if len(self._streams) >= _MAX_STREAMS:
                self._retire(next(iter(self._streams)))
            stream = _Stream(position)
        while len(data):
            size = min(len(data), BUFFER - stream.fill)
            stream.view[stream.fill : stream.fill + size] = data[:size]
            stream.fill += size
            data = data[size:]
            if stream.fill == BUFFER:
                self._flush(stream)
        self._streams[stream.end] = stream

    def _retire(self, end: int) -> None:
        stream = self._streams.pop(end)
        self._flush(stream)
        stream.view.release()
        stream.buffer.close()

    def _flush(self, stream: _Stream) -> None:
        """Write the buffer's whole blocks directly, keep its edges, hash it when it continues what is hashed."""
        hashing = None
        if stream.base + stream.first == self._hashed and stream.fill > stream.first:
            self._hashed = stream.end
            hashing = self._hasher.submit(self._hash, stream.view[stream.first : stream.fill])
        try:
            start = -(-stream.first // ALIGN) * ALIGN
            stop = stream.fill // ALIGN * ALIGN
            if start > stop:  # all within one block
                self._edges.append((stream.base + stream.first, bytes(stream.view[stream.first : stream.fill])))
            else:
                if stream.first < start:
                    self._edges.append((stream.base + stream.first, bytes(stream.view[stream.first : start])))
                self._write_blocks(stream.view[start:stop], stream.base + start)
                if stop < stream.fill:
                    self._edges.append((stream.base + stop, bytes(stream.view[stop : stream.fill])))
        finally:
            if hashing is not None:
                hashing.result()
        stream.base, stream.first = stream.end - stream.end % ALIGN, stream.end % ALIGN
        stream.fill = stream.first

    def _hash(self, view: memoryview) -> None:
        with view:  # released before the result is there: while a view is left, its buffer cannot be closed
            self._digest.update(view)

    def _write_blocks(self, view: memoryview, position: int) -> None:
        """Write whole blocks, past the cache as long as the file system takes it."""
        while len(view) and self._direct >= 0:
            try:
                n = os.pwrite(self._direct, view, position)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                n = 0  # blocks larger than ours, or no direct I/O after all
            if n == 0 or n % ALIGN:
                self._close_direct()
            position += n
            view = view[n:]
        _write_all(self._fd, view, position)

    def finish(self, size: int) -> str:
        """Write what is left, fsync, and return the sha256 of the file's `size` bytes."""
        for end in list(self._streams):
            self._retire(end)
        # partial blocks go through the page cache, when all direct writes are done
        for position, data in self._edges:
            _write_all(self._fd, memoryview(data), position)
        os.fsync(self._fd)
        buffer = memoryview(bytearray(min(BUFFER, max(1, size - self._hashed))))
        while self._hashed < size:  # what was not written in file order
            n = os.preadv(self._fd, [buffer[: size - self._hashed]], self._hashed)
            if n == 0:
                raise OSError(5, "the file ended while it was read back")
            self._digest.update(buffer[:n])
            self._hashed += n
        return self._digest.hexdigest()

    def close(self) -> None:
        """Release the descriptors."""
        self._hasher.shutdown()
        self._close_direct()
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def _close_direct(self) -> None:
        if self._direct >= 0:
            fd, self._direct = self._direct, -1
            os.close(fd)


def _write_all(fd: int, view: memoryview, position: int) -> None:
    while len(view):
        n = os.pwrite(fd, view, position)
        position += n
        view = view[n:]
