"""One safetensors file.

Reads with pread, so nothing that was read stays in this process's memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moeconv.checkpoint.header import TensorRef as TensorRef  # re-exported: the usual place to import it from
from moeconv.checkpoint.header import header_length, parse_header
from moeconv.errors import InputError, escape

_JOIN_BYTES = 1 << 22  # ranges that are closer together are announced to the system as one


class SafetensorsFile:
    """One safetensors file: its `tensors`, its `metadata`, and reads of bytes. Raises InputError for a damaged header.

    No descriptor stays open between reads (a checkpoint may have a thousand shards), so every read checks that the
    file is still the one whose header was parsed.
    """

    def __init__(self, path: Path, *, label: str | None = None) -> None:
        self.path = path
        self.label = escape(label or path.name)
        with self._opened() as fd:
            status = os.fstat(fd)
            self._status = (status.st_ino, status.st_size, status.st_mtime_ns)
            self._header = header_length(os.pread(fd, 8, 0), file_size=self.size, file=self.label)
            header = bytearray(self._header)
            self._fill(fd, 8, memoryview(header))
        parsed = parse_header(header, file_size=self.size, file=self.label, shard=label or path.name)
        self.tensors: dict[str, TensorRef] = parsed[0]
        self._metadata: dict[str, str] = parsed[1]

    @property
    def header_bytes(self) -> bytes:
        """The header's JSON. It is read again: for a large model, keeping it would double the memory of the header."""
        data = bytearray(self._header)
        self.read_at(8, memoryview(data))
        return bytes(data)

    def sha256(self) -> str:
        """The hash of the whole file, in hex."""
        digest, block = hashlib.sha256(), bytearray(_JOIN_BYTES)
        for start in range(0, self.size, len(block)):
            part = memoryview(block)[: min(len(block), self.size - start)]
            self.read_at(start, part)
            digest.update(part)
        return digest.hexdigest()

    @property
    def metadata(self) -> dict[str, str]:
        return self._metadata

    @property
    def size(self) -> int:
        return self._status[1]

    @property
    def mtime_ns(self) -> int:
        return self._status[2]

    @contextmanager
    def _opened(self) -> Iterator[int]:
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise InputError(
                f"{self.label} is missing", hint="The checkpoint is incomplete; download it again."
            ) from None
        except OSError as error:
            raise InputError(f"cannot open {self.label}: {error.strerror}", hint="Check its permissions.") from None
        try:
            yield fd
        finally:
            os.close(fd)

    def _fill(self, fd: int, start: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            try:
                n = os.preadv(fd, [view[done : done + (1 << 30)]], start + done)
            except OSError as error:
                raise InputError(
                    f"cannot read {self.label} at byte {start + done}: {error.strerror}", hint="Is the disk healthy?"
                ) from None
            if n == 0:
                raise InputError(
                    f"{self.label} ends at byte {start + done} before a tensor does",
                    hint="The file was truncated; download it again.",
                )
            done += n

    def read_at(self, start: int, view: memoryview) -> None:
        """Fill `view` from absolute offset `start`. Raises InputError if the file has changed since it was opened."""
        self.read_all([(start, view)])

    def read_all(self, places: Iterable[tuple[int, memoryview]]) -> None:
        """`read_at` of several places, with the file opened once."""
        with self._opened() as fd:
            status = os.fstat(fd)
            if (status.st_ino, status.st_size, status.st_mtime_ns) != self._status:
                raise InputError(f"{self.label} changed while it was being read", hint="Run the command again.")
            for start, view in places:
                self._fill(fd, start, view)

    def advise(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Tell the system that byte ranges [start, end) of the file are read next."""
        if not hasattr(os, "posix_fadvise"):
            return
        joined: list[list[int]] = []
        for start, end in sorted(ranges):
            if joined and start <= joined[-1][1] + _JOIN_BYTES:
                joined[-1][1] = max(joined[-1][1], end)
            else:
                joined.append([start, end])
        with contextlib.suppress(OSError, InputError), self._opened() as fd:
            for start, end in joined:
                os.posix_fadvise(fd, start, end - start, os.POSIX_FADV_WILLNEED)

    def read_into(self, name: str, view: memoryview, *, start: int = 0) -> None:
        """Fill `view` with the bytes of tensor `name` from byte `start` of the tensor on."""
        info = self.tensors[name]
        if start < 0 or start + len(view) > info.nbytes:
            raise ValueError(f"range {start}+{len(view)} is outside tensor {name!r} of {info.nbytes} bytes")
        self.read_at(info.start + start, view)

    def read(self, name: str) -> bytearray:
        """All bytes of one tensor."""
        buffer = bytearray(self.tensors[name].nbytes)
        self.read_into(name, memoryview(buffer))
        return buffer
