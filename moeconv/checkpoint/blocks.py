"""Writing a large file past the page cache: aligned blocks go to the disk directly, hashed while they are written.

Direct writes do not push other files out of memory and leave nothing for fsync to wait for; a few are in flight at a
time, so that neither the disk nor the hash waits for the other. Where the file system has no direct I/O the same code
writes through the cache.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

ALIGN = 4096
BUFFER = 1 << 20
_MAX_STREAMS = 8
_MAX_IN_FLIGHT = 3  # buffers of a file on their way to the disk and the hash, beside those that are being filled
_WRITERS = 2


def create(path: Path) -> int:
    """Open a new file. An existing file is unlinked, never truncated: it may be a link or have other hard links."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    # 0o666, so that the umask decides the mode of the file
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def _open_direct(path: Path) -> int:
    """A second descriptor of an open file that bypasses the page cache, or -1 where there is no such thing."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT)
    except (OSError, AttributeError):
        return -1


class _Stream:
    """Consecutive bytes of the file, collected in an aligned buffer. `base` is the offset of the buffer in the file."""

    def __init__(self, position: int, buffer: mmap.mmap) -> None:
        self.continue_at(position, buffer)

    def continue_at(self, position: int, buffer: mmap.mmap) -> None:
        self.buffer, self.view = buffer, memoryview(buffer)
        self.base = position - position % ALIGN
        self.first = position % ALIGN  # the bytes before it in the block are not this stream's
        self.fill = self.first

    @property
    def end(self) -> int:
        return self.base + self.fill


class BlockFile:
    """A file that is written at any offset, each byte once. It is fast for a few sequential runs at a time.

    A later `write`, or `finish`, raises the error of an earlier write to the disk.
    """

    def __init__(self, path: Path) -> None:
        self._fd = create(path)
        self._direct = _open_direct(path)
        self._buffered = self._direct < 0
        self._streams: dict[int, _Stream] = {}
        self._edges: list[tuple[int, bytes]] = []
        self._digest = hashlib.sha256()
        self._hashed = 0
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="moeconv-hash")
        self._writers = ThreadPoolExecutor(_WRITERS, thread_name_prefix="moeconv-write")
        self._in_flight: deque[tuple[mmap.mmap, list[Future[None]]]] = deque()
        self._free: list[mmap.mmap] = []

    def write(self, position: int, data: memoryview) -> None:
        """Write bytes at `position`. They reach the disk by `finish` at the latest."""
        stream = self._streams.pop(position, None)
        if stream is None:
            if len(self._streams) >= _MAX_STREAMS:
                self._flush(self._streams.pop(next(iter(self._streams))))
            stream = _Stream(position, self._buffer())
        while len(data):
            size = min(len(data), BUFFER - stream.fill)
            stream.view[stream.fill : stream.fill + size] = data[:size]
            stream.fill += size
            data = data[size:]
            if stream.fill == BUFFER:
                self._flush(stream)
                stream.continue_at(stream.end, self._buffer())
        self._streams[stream.end] = stream

    def _buffer(self) -> mmap.mmap:
        """A buffer to fill; if enough buffers are in flight, the oldest one, once it is written."""
        while len(self._in_flight) >= _MAX_IN_FLIGHT:
            self._finish_oldest()
        return self._free.pop() if self._free else mmap.mmap(-1, BUFFER)

    def _finish_oldest(self) -> None:
        """Wait until the oldest buffer in flight is written and hashed, and make it free."""
        buffer, work = self._in_flight.popleft()
        for future in work:
            future.result()
        self._free.append(buffer)

    def _flush(self, stream: _Stream) -> None:
        """Send the buffer's whole blocks to the disk, keep its edges, hash it when it continues what is hashed."""
        view, base, first, fill = stream.view, stream.base, stream.first, stream.fill
        work: list[Future[None]] = []
        if base + first == self._hashed and fill > first:
            self._hashed = stream.end
            work.append(self._hasher.submit(self._digest.update, view[first:fill]))
        start, stop = -(-first // ALIGN) * ALIGN, fill // ALIGN * ALIGN
        if start > stop:  # all within one block
            self._edges.append((base + first, bytes(view[first:fill])))
        else:
            if first < start:
                self._edges.append((base + first, bytes(view[first:start])))
            if start < stop:
                work.append(self._writers.submit(self._write_blocks, view[start:stop], base + start))
            if stop < fill:
                self._edges.append((base + stop, bytes(view[stop:fill])))
        self._in_flight.append((stream.buffer, work))

    def _write_blocks(self, view: memoryview, position: int) -> None:
        """Write whole blocks, past the page cache as long as the file system supports that."""
        while len(view) and not self._buffered:
            try:
                n = os.pwrite(self._direct, view, position)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                n = 0  # larger blocks than ALIGN, or no direct I/O after all
            if n == 0 or n % ALIGN:
                self._buffered = True
            position += n
            view = view[n:]
        _write_all(self._fd, view, position)

    def finish(self, size: int) -> str:
        """Write what is left, fsync, and return the sha256 of the file's `size` bytes."""
        for stream in self._streams.values():
            self._flush(stream)
        self._streams.clear()
        while self._in_flight:
            self._finish_oldest()
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
        """Wait for the threads that write, then release the descriptors."""
        self._hasher.shutdown()
        self._writers.shutdown()
        for name in ("_direct", "_fd"):
            if (fd := getattr(self, name)) >= 0:
                setattr(self, name, -1)
                os.close(fd)


def _write_all(fd: int, view: memoryview, position: int) -> None:
    while len(view):
        n = os.pwrite(fd, view, position)
        position += n
        view = view[n:]
