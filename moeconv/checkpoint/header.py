"""The safetensors header: the table of dtypes, a parser with limits, and a serialiser.

A file is the length of the header (8 bytes, little-endian), the header (JSON), and the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
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
BLOCK_DTYPES: dict[str, tuple[int, int]] = {
    "Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "IQ4_NL": (32, 18),
    "MXFP4": (32, 17), "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176),
    "Q6_K": (256, 210), "IQ4_XS": (256, 136),
}  # fmt: skip
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class TensorRef:
    """The place of a tensor: `start` and `end` are absolute byte offsets in the file `shard`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.start + self.nbytes


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


# the same for shapes that a model repeats for every layer and expert
repeated_nbytes = lru_cache(maxsize=4096)(tensor_nbytes)


def _is_size(n: object) -> bool:
    return type(n) is int and 0 <= n <= MAX_SIZE


_SIZE = "(?:0|[1-9][0-9]{0,17})"
# an entry as the safetensors library writes it; every other form is parsed as JSON
_USUAL = re.compile(
    r'"([^"\\\x00-\x1f]+)":\{"dtype":"([A-Z0-9_]+)","shape":\['
    rf"((?:{_SIZE}(?:,{_SIZE}){{0,{MAX_RANK - 1}}})?)\],"
    rf'"data_offsets":\[({_SIZE}),({_SIZE})\]\}}'
)


class _Usual:
    """Reads the entries that `_USUAL` matches. Equal shapes are checked once and share one tuple."""

    def __init__(self, base: int, file: str, shard: str) -> None:
        self.base, self.file, self.shard = base, file, shard
        self.known: dict[tuple[str, str], tuple[str, tuple[int, ...], int]] = {}

    def __call__(self, entry: re.Match[str]) -> TensorRef:
        name, dtype, sizes, first, last = entry.groups()
        start, end, known = int(first), int(last), self.known.get((dtype, sizes))
        if known is None or end - start != known[2]:  # a new shape, or an error to describe
            shape = [int(n) for n in sizes.split(",")] if sizes else []
            stated = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
            ref = _tensor_ref(name, stated, self.base, self.file, self.shard)
            self.known[dtype, sizes] = (ref.dtype, ref.shape, ref.nbytes)
            return ref
        return TensorRef(name, known[0], known[1], self.shard, self.base + start, known[2])


def _tensor_ref(name: str, entry: object, base: int, file: str, shard: str) -> TensorRef:
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
    return TensorRef(name, dtype, tuple(shape), shard, base + start, expected)


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


def parse_header(
    data: bytes | bytearray, *, file_size: int, file: str, shard: str = ""
) -> tuple[dict[str, TensorRef], dict[str, str]]:
    """Parse the JSON of a header (without the length). Returns the tensors in file order, and the metadata.

    `file` names the file in errors, `shard` in the tensors. Raises InputError unless each tensor's number of bytes
    matches its shape, and the tensors fill the file without gaps or overlaps.
    """
    what, base = f"{file}: header", 8 + len(data)
    metadata: dict[str, str] | None = None
    found: dict[str, TensorRef] = {}
    usual = _Usual(base, file, shard)
    for name, entry in parse_items(data, what=what, limits=header_limits(file_size), usual=_USUAL):
        if name in found or (name == "__metadata__" and metadata is not None):
            raise InputError(f"{what}: not valid JSON ({duplicate(name)})", hint="Download it again.")
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(v, str) for v in entry.values()):
                raise InputError(f"{file}: __metadata__ must map strings to strings", hint="Download it again.")
            metadata = entry
        elif isinstance(entry, re.Match):
            found[name] = usual(entry)
        else:
            found[name] = _tensor_ref(name, entry, base, file, shard)
    refs = sorted(found.values(), key=lambda t: (t.start, t.nbytes))
    position = base
    for ref in refs:
        if ref.start != position:
            kind = "overlaps its neighbour" if ref.start < position else "leaves a gap before it"
            raise InputError(f"{file}: tensor {escape(ref.name)!r} {kind}", hint="The header is damaged or hostile.")
        position += ref.nbytes
    if position != file_size:
        raise InputError(
            f"{file}: tensors end at byte {position}, the file has {file_size}",
            hint="The file is truncated or has trailing bytes; download it again.",
        )
    return {ref.name: ref for ref in refs}, metadata or {}


def serialise_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], *, metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, TensorRef]]:
    """The header's bytes (length included) for tensors in the given order, and the place of each tensor in the file.

    The JSON is padded with spaces so that the data starts at a multiple of 8 bytes.
    """
    entries: JsonObject = {"__metadata__": dict(metadata or _METADATA)}
    position = 0
    for name, dtype, shape in tensors:
        if name in entries:
            raise ValueError(f"tensor {name!r} appears twice")
        end = position + tensor_nbytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": (position, end)}
        position = end
    text = _text(entries).encode()
    text += b" " * (-len(text) % _ALIGN)
    base, refs = 8 + len(text), {}
    for name, entry in entries.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            refs[name] = TensorRef(name, entry["dtype"], tuple(entry["shape"]), "", base + start, end - start)
    return struct.pack("<Q", len(text)) + text, refs


def file_cost(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[int, int, int]:
    """The size of the file that `serialise_header` lays out, computed without making its header.

    Returns (bytes of the header's JSON, values in it as `Limits` counts them, bytes of the file). Raises ValueError for
    a name that appears twice.
    """
    names: list[str] = []
    length, values, end, digits, longer = *_EMPTY, 0, 1, 10
    for name, dtype, shape in tensors:
        names.append(name)
        entry = _entry_cost(dtype, shape)
        end += entry[2]
        length += entry[0] + digits
        while end >= longer:
            digits, longer = digits + 1, longer * 10
        length += digits  # an end offset is written twice: it is also the next tensor's start
        values += entry[1]
    if len(set(names)) != len(names):
        raise ValueError(f"tensor {next(n for n in names if names.count(n) > 1)!r} appears twice")
    of_names = _names_cost(names)
    length += of_names[0]
    length += -length % _ALIGN
    return length, values + of_names[1], 8 + length + end


def most_cost(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[int, int]:
    """An upper bound of the (bytes, values) that tensors add to a header, in whatever order they are."""
    names: list[str] = []
    length = values = 0
    for name, dtype, shape in tensors:
        names.append(name)
        entry = _entry_cost(dtype, shape)
        length += entry[0] + 2 * _LONGEST_OFFSET
        values += entry[1]
    of_names = _names_cost(names)
    return length + of_names[0], values + of_names[1]


def json_length(text: str) -> int:
    """Number of characters of a string in JSON, quotes and escapes included."""
    return len(encode_basestring_ascii(text))


def _names_cost(names: Sequence[str]) -> tuple[int, int]:
    """The (bytes, values) of names in a header, with their quotes."""
    joined = "".join(names)
    return json_length(joined) + 2 * len(names) - 2, sum(joined.count(mark) for mark in ",{[")


@lru_cache(maxsize=4096)
def _entry_cost(dtype: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """What a tensor adds to a header besides its name and the digits of its offsets, and to the file.

    Returns (bytes of JSON, values, bytes of the tensor).
    """
    entry = _text({"dtype": dtype, "shape": shape, "data_offsets": ["", ""]})
    length = len(entry) - len('""""') + len(",:")
    return length, max(len(shape), 1) + 6, tensor_nbytes(dtype, shape)


def _text(entries: JsonObject) -> str:
    return json.dumps(entries, separators=(",", ":"))


_METADATA = {"format": "pt"}
_EMPTY = len(_text({"__metadata__": _METADATA})), 2  # (bytes, values) of a header without tensors
_LONGEST_OFFSET = len(str(MAX_SIZE))
