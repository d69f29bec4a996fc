"""The part of a GGUF file before its tensors. The `gguf` package encodes the key-value metadata; this module adds the
tensor infos and offsets.

Layout (ggml's docs/gguf.md): magic, version, counts, key-values, tensor infos, then the tensors, aligned to 32 bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from moeconv.checkpoint.header import TensorRef, tensor_nbytes
from moeconv.errors import InputError, escape

if TYPE_CHECKING:
    from gguf import GGUFReader

ALIGN = 32
_MAGIC, _VERSION = b"GGUF", 3
_UINT32, _STRING, _ARRAY = 4, 8, 9  # types of values
# dtype as in header.py -> ggml_type
GGML_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12,
    "Q5_K": 13, "Q6_K": 14, "IQ4_NL": 20, "IQ4_XS": 23, "BF16": 30, "MXFP4": 39,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stack:
    """One tensor of the file, of row-major `shape`. Its bytes are those of the planned tensors `parts`, in order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return tensor_nbytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class GgufHead:
    """The content of the file before the tensors' bytes: `metadata` are `count` encoded key-value pairs."""

    metadata: bytes
    count: int
    stacks: tuple[Stack, ...]

    def serialise(self) -> tuple[bytes, dict[str, TensorRef], int]:
        """(bytes before the data, place of each part in the file by its name, size of the file in bytes)."""
        data = bytearray(_MAGIC + struct.pack("<IQQ", _VERSION, len(self.stacks), self.count) + self.metadata)
        position = 0
        offsets = []
        for stack in self.stacks:
            name = stack.name.encode()
            data += struct.pack("<Q", len(name)) + name + struct.pack("<I", len(stack.shape))
            data += b"".join(struct.pack("<Q", n) for n in reversed(stack.shape))  # ggml: innermost dimension first
            data += struct.pack("<IQ", GGML_TYPES[stack.dtype], position)
            offsets.append(position)
            position = padded(position + stack.nbytes)
        data += bytes(padded(len(data)) - len(data))
        infos = {}
        for stack, offset in zip(self.stacks, offsets, strict=True):
            shape = stack.shape if len(stack.parts) == 1 else stack.shape[1:]
            start = len(data) + offset
            for part in stack.parts:
                infos[part] = TensorRef(part, stack.dtype, shape, "", start, tensor_nbytes(stack.dtype, shape))
                start = infos[part].end
        return bytes(data), infos, len(data) + position


def metadata_bytes(values: Mapping[str, str | int | list[str]]) -> tuple[bytes, int]:
    """(encoded key-value pairs, their number): strings, uint32 numbers and arrays of strings."""
    data = bytearray()
    for key, value in values.items():
        if isinstance(value, int):
            data += encoded_pair(key, _UINT32, struct.pack("<I", value))
        elif isinstance(value, str):
            data += encoded_pair(key, _STRING, _string(value))
        else:
            listed = struct.pack("<IQ", _STRING, len(value)) + b"".join(map(_string, value))
            data += encoded_pair(key, _ARRAY, listed)
    return bytes(data), len(values)


def encoded_pair(key: str, kind: int, value: bytes) -> bytes:
    """A key and its value, which is encoded as the type `kind`."""
    return _string(key) + struct.pack("<I", kind) + value


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def padded(size: int) -> int:
    """`size` rounded up to a multiple of the alignment."""
    return -(-size // ALIGN) * ALIGN


def written_tensors(path: Path) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, row-major shape) of every tensor, read back with the `gguf` package."""
    reader = open_gguf(path)
    for tensor in reader.tensors:
        yield tensor.name, tensor.tensor_type.name, tuple(int(n) for n in reversed(tensor.shape))


def open_gguf(path: Path) -> GGUFReader:
    """The `gguf` package's reader of a file. Raises InputError for a file that it cannot read."""
    try:
        state = path.stat()
        return _reader(path, (state.st_mtime_ns, state.st_size))
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise InputError(f"{escape(path.name)} is not a readable GGUF file: {error}", hint="Write it again.") from None


@lru_cache(maxsize=1)  # a reader takes 15 us per token of the vocabulary, and an output is read back three times
def _reader(path: Path, _version: tuple[int, int]) -> GGUFReader:
    """A reader that is cached for `_version`, the file's (modification time in ns, size), which a rewrite changes."""
    from gguf import GGUFReader

    return GGUFReader(path)
