"""llama.cpp's importance matrix: for each matrix and column, the mean square of the input that the column multiplies.

Two layouts are read. GGUF: for every matrix NAME the tensors NAME.in_sum2 [experts, columns], sums of squares, and
NAME.counts [experts, 1], numbers of tokens, both in float32; metadata general.type = imatrix. The older .dat: entries
with a name, a number of calls, and means times that number. An expert without tokens gets the mean of its layer.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moeconv.checkpoint.gguf import open_gguf
from moeconv.checkpoint.hashes import file_sha256
from moeconv.errors import InputError, escape

SUMS, COUNTS = ".in_sum2", ".counts"
_MOST_ENTRIES, _LONGEST = 1 << 20, 4096


@dataclass(frozen=True, eq=False)
class Entry:
    """The importance of one matrix: float32 sums [experts, columns] or, of the older layout, their means [1, experts *
    columns], and the numbers of tokens [experts]."""

    sums: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True, eq=False)
class Imatrix:
    """An importance matrix that is open for reading. It is a source of bytes for plans: the importance of expert `e` of
    a matrix is the tensor NAME#e#columns, with the number of columns."""

    label: str
    sha256: str
    entries: Mapping[str, Entry]

    def fits(self, name: str, *, experts: int, columns: int) -> bool:
        """Whether it has the importance of a matrix. Raises InputError where it has it with another size."""
        entry = self.entries.get(name)
        if entry is None:
            return False
        if entry.sums.size != experts * columns or entry.counts.size not in (1, experts):
            raise InputError(
                f"{self.label}: {escape(name)} has {entry.sums.size} values, but the model has {experts * columns}",
                hint="It belongs to another model. Make one for this model: moeconv calibrate --imatrix.",
            )
        return True

    def unused(self, name: str, *, experts: int) -> list[int]:
        """The experts of a matrix that no token was routed to."""
        counts = self.entries[name].counts
        return [] if counts.size != experts or experts == 1 else np.flatnonzero(counts == 0).tolist()

    def values(self, name: str, expert: int, columns: int) -> np.ndarray:
        """The importance float32 [columns] of a matrix, up to a factor. Raises InputError for values that are negative
        or not finite."""
        entry = self.entries[name]
        sums = np.asarray(entry.sums, np.float32).reshape(-1, columns)
        used = np.broadcast_to(np.asarray(entry.counts).reshape(-1), len(sums)) > 0
        found: np.ndarray = sums[expert] if used[expert] else sums[used].sum(0, dtype=np.float32)
        if not np.isfinite(found).all() or (found < 0).any():
            raise InputError(
                f"{self.label}: {escape(name)} has values that are negative or not finite", hint="Make it again."
            )
        return found

    def read_into(self, name: str, view: memoryview, *, start: int = 0) -> None:
        """Fill `view` with the bytes of the importance NAME#expert#columns, beginning at byte `start`."""
        matrix, expert, columns = name.split("#")
        data = self.values(matrix, int(expert), int(columns)).tobytes()
        view[:] = data[start : start + len(view)]


def open_imatrix(path: str | Path) -> Imatrix:
    """Open an importance matrix in either layout. Raises InputError for any other file."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        entries = _gguf_entries(path) if is_gguf else _dat_entries(path.read_bytes())
        digest = file_sha256(path)
    except (OSError, struct.error, ValueError, UnicodeDecodeError) as error:
        raise InputError(
            f"{escape(path.name)} is not a readable importance matrix: {escape(error)}",
            hint="Make one: moeconv calibrate MODEL --imatrix FILE --data TEXT.",
        ) from None
    return Imatrix(escape(path.name), digest, entries)


def _gguf_entries(path: Path) -> dict[str, Entry]:
    tensors = {tensor.name: tensor for tensor in open_gguf(path).tensors}
    names = [name.removesuffix(SUMS) for name in tensors if name.endswith(SUMS)]
    if not names:
        raise ValueError(f"it has no tensors named *{SUMS}")
    entries = {}
    for name in names:
        sums, counts = tensors[name + SUMS], tensors.get(name + COUNTS)
        if counts is None or {sums.tensor_type.name, counts.tensor_type.name} != {"F32"}:
            raise ValueError(f"{name} has no {COUNTS} in float32")
        if sums.data.size % max(1, counts.data.size):
            raise ValueError(f"{name} has {sums.data.size} sums for {counts.data.size} counts")
        entries[name] = Entry(sums.data, np.asarray(counts.data).reshape(-1))
    return entries


def _dat_entries(data: bytes) -> dict[str, Entry]:
    (count,) = struct.unpack_from("<i", data)
    if not 0 < count <= _MOST_ENTRIES:
        raise ValueError("it is neither GGUF nor llama.cpp's .dat")
    entries, at = {}, 4
    for _ in range(count):
        (length,) = struct.unpack_from("<i", data, at)
        if not 0 < length <= _LONGEST:
            raise ValueError("it is neither GGUF nor llama.cpp's .dat")
        name = data[at + 4 : at + 4 + length].decode()
        calls, size = struct.unpack_from("<ii", data, at + 4 + length)
        at += 12 + length
        if not 0 < size <= (len(data) - at) // 4:
            raise ValueError("it is truncated")
        entries[name] = Entry(np.frombuffer(data, "<f4", size, at), np.array([max(calls, 1)]))
        at += 4 * size
    return entries
