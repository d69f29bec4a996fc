"""Writing one safetensors file: the header first, then tensor after tensor into place, hashed on the way.

No shard is ever held in memory. Every write that can fail ends as an OutputError that says what to do.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from moeconv.checkpoint.blocks import BlockFile, create
from moeconv.checkpoint.gguf import GgufHead
from moeconv.checkpoint.header import TensorInfo, header_limits, serialise_header
from moeconv.errors import OutputError, escape


@contextmanager
def output_errors(path: Path | str) -> Iterator[None]:
    """Turn an OSError of the block into an OutputError that names `path`."""
    try:
        yield
    except OSError as error:
        name = escape(Path(path).name)
        raise OutputError(
            f"cannot write {name}: {error.strerror or error}",
            hint="Free space or correct permissions, then run the same command again: finished shards are kept.",
        ) from error


class ShardWriter:
    """A safetensors file being written, or GGUF when given its `head`. `write` takes the tensors' bytes in any order,
    `finish` seals the file."""

    def __init__(
        self,
        path: Path,
        tensors: Iterable[tuple[str, str, tuple[int, ...]]],
        *,
        metadata: Mapping[str, str] | None = None,
        head: GgufHead | None = None,
    ) -> None:
        self.path = path
        if head is None:
            header, self._infos = serialise_header(tensors, metadata=metadata)
            self._size = max((info.end for info in self._infos.values()), default=len(header))
            _check_header(path, header, self._size)
        else:
            header, self._infos, self._size = head.serialise()
        self._missing = {name: info.nbytes for name, info in self._infos.items()}
        self._gaps = _gaps(self._infos.values(), self._size)
        with output_errors(path):
            self._file = BlockFile(path)
            try:
                self._file.write(0, memoryview(header))
            except BaseException:
                self._file.close()
                raise

    def write(self, name: str, data: bytes | bytearray | memoryview, *, start: int = 0) -> None:
        """Write bytes of tensor `name` from byte `start` of it on; each byte of each tensor is written once."""
        view = memoryview(data).cast("B")
        info = self._infos[name]
        if start + len(view) > info.nbytes:
            raise ValueError(f"{len(view)} bytes at {start} do not fit tensor {name!r} of {info.nbytes} bytes")
        with output_errors(self.path):
            self._file.write(info.start + start, view)
            if start + len(view) == info.nbytes and (gap := self._gaps.get(info.end)):
                self._file.write(info.end, memoryview(bytes(gap)))
        self._missing[name] -= len(view)

    def finish(self) -> tuple[str, int]:
        """Check that every tensor is whole, hash what was written out of order, fsync. Returns (sha256, bytes)."""
        unfinished = [name for name, left in self._missing.items() if left]
        if unfinished:
            raise ValueError(f"{self.path.name}: tensor {unfinished[0]!r} was not written whole")
        with output_errors(self.path):
            sha256 = self._file.finish(self._size)
            self._file.close()
        return sha256, self._size

    def close(self) -> None:
        """Release the descriptor; an unfinished file stays for the caller to remove."""
        self._file.close()


def _check_header(path: Path, header: bytes, size: int) -> None:
    """Before any work goes into the file: that its header can be read again. Raises OutputError."""
    limits = header_limits(size)
    values = sum(header.count(mark) for mark in (b",", b"{", b"["))
    if len(header) > limits.bytes or values > limits.values:
        raise OutputError(
            f"{escape(path.name)} would have a header of {len(header)} bytes with about {values} values, more than can "
            f"be opened again ({limits.bytes} and {limits.values})",
            hint="Split the work: fewer layers or tensors at a time, or a smaller --shard-size.",
        )


def _gaps(infos: Iterable[TensorInfo], size: int) -> dict[int, int]:
    """Where a tensor's end is no other's start -> the bytes of padding there."""
    ordered = sorted(infos, key=lambda info: (info.start, info.end))
    following = [*(info.start for info in ordered[1:]), size]
    return {info.end: start - info.end for info, start in zip(ordered, following, strict=bool(ordered))}


def write_file(path: Path, data: bytes) -> None:
    """Write a small file whole and fsync it; the directory it is in is made where it is missing."""
    with output_errors(path):
        if not os.path.isdir(path.parent):
            path.parent.mkdir(exist_ok=True)
        fd = create(path)
        try:
            view = memoryview(data)
            while len(view):
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)


def sync_directory(path: Path) -> None:
    """fsync a directory, so that the names in it survive a power cut."""
    with output_errors(path):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` at `path` in one step: a reader sees the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_file(temporary, data)
        with output_errors(path):
            os.replace(temporary, path)
        sync_directory(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def writing_artifact(
    path: Path,
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
    *,
    metadata: Mapping[str, str],
    overwrite: bool = False,
) -> Iterator[ShardWriter]:
    """A ShardWriter for a single artifact file, put at `path` in one step when the block ends well.

    Raises OutputError when `path` exists and `overwrite` is not set.
    """
    if os.path.lexists(path) and not overwrite:
        raise OutputError(f"{escape(path)} exists already", hint="Remove it, or pass --overwrite.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    writer = ShardWriter(temporary, tensors, metadata=metadata)
    try:
        yield writer
        writer.finish()
        if os.path.lexists(path) and not overwrite:
            raise OutputError(
                f"{escape(path)} appeared while this run was writing",
                hint="Move it away and run the same command again.",
            )
        with output_errors(path):
            os.replace(temporary, path)
        sync_directory(path.parent)
    except BaseException:
        writer.close()
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
