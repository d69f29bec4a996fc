"""Writes one safetensors file: first the header, then each tensor at its place, hashed while it is written.

No shard is ever held in memory. A write that fails raises an OutputError that says what to do.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from moeconv.checkpoint.blocks import BlockFile, create
from moeconv.checkpoint.gguf import GgufHead
from moeconv.checkpoint.header import TensorRef, header_limits, serialise_header
from moeconv.errors import OutputError, escape


@contextmanager
def output_errors(path: Path | str) -> Iterator[None]:
    """Turn an OSError that the block raises into an OutputError that names `path`."""
    try:
        yield
    except OSError as error:
        name = escape(Path(path).name)
        raise OutputError(
            f"cannot write {name}: {error.strerror or error}",
            hint="Free space or correct permissions, then run the same command again: finished shards are kept.",
        ) from error


class ShardWriter:
    """A safetensors file that is being written, or a GGUF file if `head` is given.

    `write` accepts the tensors' bytes in any order; `finish` completes the file.
    """

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
        """Write bytes of tensor `name`, from its byte `start` on. Each byte of a tensor must be written once."""
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
        """Check that every tensor is complete, hash what was written out of order, fsync and close the file.

        Returns (sha256 of the file, size in bytes). Raises ValueError for an incomplete tensor.
        """
        unfinished = [name for name, left in self._missing.items() if left]
        if unfinished:
            raise ValueError(f"{self.path.name}: tensor {unfinished[0]!r} was not written whole")
        with output_errors(self.path):
            sha256 = self._file.finish(self._size)
            self._file.close()
        return sha256, self._size

    def close(self) -> None:
        """Close the file descriptor. The caller must remove an unfinished file."""
        self._file.close()


def _check_header(path: Path, header: bytes, size: int) -> None:
    """Raises OutputError, before any work is done, for a header too large to be read again."""
    limits = header_limits(size)
    values = sum(header.count(mark) for mark in (b",", b"{", b"["))
    if len(header) > limits.bytes or values > limits.values:
        raise OutputError(
            f"{escape(path.name)} would have a header of {len(header)} bytes with about {values} values, more than can "
            f"be opened again ({limits.bytes} and {limits.values})",
            hint="Split the work: fewer layers or tensors at a time, or a smaller --shard-size.",
        )


def _gaps(infos: Iterable[TensorRef], size: int) -> dict[int, int]:
    """{end of a tensor: bytes of padding between it and the next tensor}, with 0 where there is no padding."""
    ordered = sorted(infos, key=lambda info: (info.start, info.end))
    following = [*(info.start for info in ordered[1:]), size]
    return {info.end: start - info.end for info, start in zip(ordered, following, strict=bool(ordered))}


def write_file(path: Path, data: bytes) -> None:
    """Write a small file and fsync it; create its directory if that is missing."""
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
    """fsync a directory, so that new and renamed files in it survive a power failure."""
    with output_errors(path):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def replace_file(path: Path, data: bytes) -> None:
    """Replace the file at `path` atomically: a reader sees either the complete old file or the complete new one."""
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
    head: GgufHead | None = None,
) -> Iterator[ShardWriter]:
    """A context manager with a ShardWriter for a single artifact file: a safetensors file, or GGUF with `head`.

    The file is moved to `path` atomically when the block ends without an exception. Raises OutputError if `path` exists
    and `overwrite` is false.
    """
    if os.path.lexists(path) and not overwrite:
        raise OutputError(f"{escape(path)} exists already", hint="Remove it, or pass --overwrite.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    writer = ShardWriter(temporary, tensors, metadata=metadata, head=head)
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
