"""The safetensors header: the table of dtypes, a parser with limits, and a serialiser.

A file is the length of the header (8 bytes, little-endian), the header (JSON), and the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii

from moeconv.checkpoint.strictjson import MAX_VALUES, Limits, duplicate, parse_items
from moeconv.errors import InputError, LimitError, escape
from moeconv.types import JsonObject

MAX_HEADER_BYTES = 32 << 20  # in a file without tensors; for comparison, the header of 40,000 tensors takes 6 MB
LIBRARY_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
# the most that a plan puts into the header of one file, so that the file can be opened however small its tensors are
PLAN_HEADER, PLAN_VALUES = MAX_HEADER_BYTES - 4096, MAX_VALUES - 16
MAX_RANK = 16
MAX_SIZE = 2**63 - 1  # the largest dimension or offset: the largest file offset of every file system
_ALIGN = 8

# dtype name in the file -> bits per element
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
# dtype of GGUF tensors that no safetensors file has -> (elements per block, bytes per block)
BLOCK_DTYPES: dict[str, tuple[int, int]] = {"Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_K": (256, 144)}
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of one file. `start` and `end` are absolute byte offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def tensor_nbytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor of this dtype and shape.

    Raises KeyError for an unknown dtype, and ValueError for a shape that is not a whole number of blocks or bytes.
    """
    if dtype in BLOCK_DTYPES:
        elements, nbytes = BLOCK_DTYPES[dtype]
        if math.prod(shape) % elements:
            raise ValueError(f"{math.prod(shape)} elements are not whole blocks of {elements}")
        return math.prod(shape) // elements * nbytes
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8:
        raise ValueError(f"{bits} bits are not whole bytes")
    return bits // 8


def _is_size(n: object) -> bool:
    return type(n) is int and 0 <= n <= MAX_SIZE


def _tensor_info(name: str, entry: object, base: int, file: str) -> TensorInfo:
    def fail(why: str) -> InputError:
        return InputError(f"{file}: tensor {escape(name)!r}: {why}", hint="The header is damaged; download it again.")

    if "\0" in name or not name:
        raise fail("an empty name or a NUL in it")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise fail("expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise fail(f"unknown dtype {escape(dtype)!r}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(_is_size(n) for n in shape):
        raise fail("shape must be a list of non-negative integers")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        raise fail("data_offsets must be two non-negative integers")
    start, end = offsets
    try:
        expected = tensor_nbytes(dtype, shape)
    except ValueError as error:
        raise fail(str(error)) from None
    if end - start != expected:
        raise fail(f"shape {shape} of {dtype} takes {expected} bytes, data_offsets span {end - start}")
    return TensorInfo(name, dtype, tuple(shape), base + start, base + end)


def header_limits(file_size: int) -> Limits:
    """The limits for the header of a file of this size in bytes.

    They allow a file of many small tensors, and in a large file as many tensors as the safetensors library can open.
    """
    size = min(MAX_HEADER_BYTES + file_size // 64, LIBRARY_HEADER_BYTES)
    return Limits(size, MAX_VALUES + file_size // 512)


def header_length(prefix: bytes, *, file_size: int, file: str) -> int:
    """Length in bytes of the header's JSON, from the first 8 bytes of the file.

    Raises LimitError for a header beyond the limits, and InputError for one that is longer than the file.
    """
    if len(prefix) < 8:
        raise InputError(f"{file}: {file_size} bytes is too short for a safetensors file", hint="Download it again.")
    length: int = struct.unpack("<Q", prefix)[0]
    limit = header_limits(file_size).bytes
    if length <= file_size - 8 and length > limit:
        raise LimitError(
            f"{file}: a header of {length} bytes is beyond the limit of {limit}",
            hint="The file is damaged or hostile.",
        )
    if length + 8 > file_size:
        raise InputError(
            f"{file}: the header claims {length} bytes, the file has {file_size}",
            hint="The file is truncated or not safetensors (a Git LFS pointer?); download it again.",
        )
    return length


def parse_header(data: bytes | bytearray, *, file_size: int, file: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Parse the JSON of a header (without the length). Returns the tensors in file order, and the metadata.

    Raises InputError unless each tensor's number of bytes matches its shape, and the tensors fill the file without gaps
    or overlaps.
    """
    what, base = f"{file}: header", 8 + len(data)
    metadata: dict[str, str] | None = None
    found: dict[str, TensorInfo] = {}
    for name, entry in parse_items(data, what=what, limits=header_limits(file_size)):
        if name in found or (name == "__metadata__" and metadata is not None):
            raise InputError(f"{what}: not valid JSON ({duplicate(name)})", hint="Download it again.")
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(v, str) for v in entry.values()):
                raise InputError(f"{file}: __metadata__ must map strings to strings", hint="Download it again.")
            metadata = entry
        else:
            found[name] = _tensor_info(name, entry, base, file)
    infos = sorted(found.values(), key=lambda t: (t.start, t.end))
    position = base
    for info in infos:
        if info.start != position:
            kind = "overlaps its neighbour" if info.start < position else "leaves a gap before it"
            raise InputError(f"{file}: tensor {escape(info.name)!r} {kind}", hint="The header is damaged or hostile.")
        position = info.end
    if position != file_size:
        raise InputError(
            f"{file}: tensors end at byte {position}, the file has {file_size}",
            hint="The file is truncated or has trailing bytes; download it again.",
        )
    return {info.name: info for info in infos}, metadata or {}


def serialise_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], *, metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, TensorInfo]]:
    """The header's bytes (length included) for tensors in the given order, and the place of each tensor in the file.

    The JSON is padded with spaces so that the data starts at a multiple of 8 bytes.
    """
    entries, _ = _entries(tensors, metadata)
    text = _padded(entries)
    base = 8 + len(text)
    infos = {}
    for name, entry in entries.items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            infos[name] = TensorInfo(name, entry["dtype"], tuple(entry["shape"]), base + start, base + stop)
    return struct.pack("<Q", len(text)) + text, infos


def file_cost(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[int, int, int]:
    """The size of the file that `serialise_header` lays out.

    Returns (bytes of the header's JSON, values in it as `Limits` counts them, bytes of the file).
    """
    entries, end = _entries(tensors, None)
    text = _padded(entries)
    return len(text), sum(text.count(mark) for mark in (b",", b"{", b"[")), 8 + len(text) + end


def entry_cost(name: str, dtype: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """An upper bound of the (bytes, values) that a tensor takes in a header."""
    values = max(len(shape), 1) + 6 + name.count(",") + name.count("{") + name.count("[")
    # 88 bytes are enough for the keys of an entry and two offsets of any length
    return json_length(name) + len(dtype) + sum([len(str(n)) + 1 for n in shape]) + 88, values


def json_length(text: str) -> int:
    """Number of characters of a string in JSON, quotes and escapes included."""
    return len(encode_basestring_ascii(text))


def _entries(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None
) -> tuple[JsonObject, int]:
    """The header as a JSON object, and the end of the last tensor, in bytes from the beginning of the data."""
    entries: JsonObject = {"__metadata__": dict(metadata or {"format": "pt"})}
    position = 0
    for name, dtype, shape in tensors:
        if name in entries:
            raise ValueError(f"tensor {name!r} appears twice")
        end = position + tensor_nbytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": (position, end)}
        position = end
    return entries, position


def _padded(entries: JsonObject) -> bytes:
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % _ALIGN)
