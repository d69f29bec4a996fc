"""From source bytes to output bytes for the items of a shard: copies move in chunks, and a pool runs kernels ahead.

At most `window` computed items are in flight, so that memory holds a few of the largest items for a shard of any size.
Bytes that go to several places are read once, and written from the same buffer.
"""

from __future__ import annotations

import threading
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Protocol

from moeconv.checkpoint.header import FLOAT_DTYPES
from moeconv.checkpoint.writer import ShardWriter
from moeconv.errors import CheckError, InputError, Interrupted, escape
from moeconv.plan.kernels import Buffer, load_kernel
from moeconv.plan.kernels.arrays import all_finite
from moeconv.plan.meter import Meter
from moeconv.plan.plan import Input, Item, Shard, TensorSpec

CHUNK = 1 << 22  # bytes that a copy moves at a time
HOLD = 1 << 25  # bytes that all workers together may hold for tensors with several copies in one file

_DAMAGED = (
    "The checkpoint is damaged. Without --strict, such a tensor is copied with a warning; it can never be packed."
)


class ByteSource(Protocol):
    """A source of bytes for items: a checkpoint, or one safetensors file."""

    def read_into(self, name: str, view: memoryview, *, start: int = 0) -> None: ...


@dataclass
class Flow:
    """The state that all shards of a run share. When `stop` is set, every worker stops at its next chunk."""

    origins: Mapping[str, ByteSource]
    meter: Meter
    strict: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    warnings: list[str] = field(default_factory=list)
    _seen: set[tuple[str, str]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def check_stop(self) -> None:
        if self.stop.is_set():
            raise Interrupted("stopped")

    def check_source(self, ref: Input, data: Buffer) -> bool:
        """Whether the data has no NaN and no infinity. Each tensor that has one is reported once, by a warning. Raises
        InputError instead with --strict."""
        if ref.dtype not in FLOAT_DTYPES or all_finite(data, ref.dtype):
            return True
        with self._lock:
            if (ref.origin, ref.tensor) in self._seen:
                return False
            self._seen.add((ref.origin, ref.tensor))
            text = f"tensor {escape(ref.tensor)!r} holds NaN or infinite values"
            if self.strict:
                raise InputError(text, hint=_DAMAGED)
            self.warnings.append(text)
        return False


def source_crc(flow: Flow, shard: Shard) -> int:
    """The checksum of every source range behind a shard, read again."""
    checksum = _Checksum()
    for item in shard.work:
        for ref in item.inputs:
            if checksum.wants(ref):
                crc = 0
                for start, size in _chunks(ref):
                    flow.check_stop()
                    buffer = bytearray(size)
                    flow.origins[ref.origin].read_into(ref.tensor, memoryview(buffer), start=start)
                    flow.check_source(ref, buffer)  # so that a resumed run warns and refuses like an uninterrupted one
                    crc = zlib.crc32(buffer, crc)
                checksum.add(crc)
    return checksum.value


def _chunks(ref: Input) -> Iterator[tuple[int, int]]:
    for start in range(0, ref.nbytes, CHUNK):
        yield ref.start + start, min(CHUNK, ref.nbytes - start)


class _Checksum:
    """A CRC-32 over the CRC-32s of the source ranges of a shard, each range once, in the order of the work."""

    def __init__(self) -> None:
        self.value = 0
        self._known: set[Input] = set()

    def wants(self, ref: Input) -> bool:
        if ref in self._known:
            return False
        self._known.add(ref)
        return True

    def add(self, crc: int) -> None:
        self.value = zlib.crc32(crc.to_bytes(4, "little"), self.value)


Place = tuple[ShardWriter, TensorSpec]


@dataclass(frozen=True, slots=True)
class _Run:
    """Adjacent items that write the same bytes. `places[r]` has the r-th of their tensors in every shard."""

    item: Item
    places: list[list[Place]]


def _runs(shards: Sequence[Shard], writers: Sequence[ShardWriter]) -> Iterator[_Run]:
    """The items of one shard, or of several shards that copy the same bytes; adjacent copies of the same bytes are
    joined."""
    run: _Run | None = None
    for items in zip(*(shard.work for shard in shards), strict=True):
        lead = items[0]
        places = [(writer, item.outputs[0]) for writer, item in zip(writers, items)] if lead.kernel == "copy" else []
        if run is not None and lead.kernel == run.item.kernel == "copy" and lead.inputs == run.item.inputs:
            run.places.append(places)
            continue
        if run is not None:
            yield run
        run = _Run(lead, [places])
    if run is not None:
        yield run


def write_items(
    flow: Flow, shards: Sequence[Shard], writers: Sequence[ShardWriter], *, pool: Executor, window: int, hold: int
) -> int:
    """Write every item of a shard, or of several shards that copy the same bytes under different names.

    `hold` is the number of bytes of a tensor that may be kept for further copies in the same file. Returns the checksum
    of the source bytes that were read.
    """
    checksum = _Checksum()
    ahead: deque[tuple[_Run, Future[tuple[list[int], list[Buffer]]] | None]] = deque()
    computing = 0
    waiting = _runs(shards, writers)
    exhausted = False
    while ahead or not exhausted:
        while computing < window and not exhausted:
            run = next(waiting, None)
            if run is None:
                exhausted = True
            elif run.item.kernel == "copy":
                ahead.append((run, None))
                if len(ahead) == 1:
                    break  # nothing comes before this copy, so it is moved now
            else:
                ahead.append((run, pool.submit(_compute, flow, run.item)))
                computing += 1
        if not ahead:
            break
        run, future = ahead.popleft()
        if future is None:
            _copy(flow, run, checksum, hold)
            continue
        computing -= 1
        crcs, outputs = future.result()
        for ref, crc in zip(run.item.inputs, crcs, strict=True):
            if checksum.wants(ref):
                checksum.add(crc)
        for spec, data in zip(run.item.outputs, outputs, strict=True):
            writers[0].write(spec.name, data, start=spec.at * spec.nbytes)
            flow.meter.advance(spec.nbytes)
    return checksum.value


def _copy(flow: Flow, run: _Run, checksum: _Checksum, hold: int) -> None:
    """Copy the concatenated bytes of the inputs to each place. They are read once where memory allows it.

    A file is hashed in its order. Adjacent copies in one file therefore need the whole tensor in memory (at most `hold`
    bytes), while copies with one place in each of several files are written chunk by chunk.
    """
    total = sum(ref.nbytes for ref in run.item.inputs)
    for _, spec in (place for places in run.places for place in places):
        if total != spec.nbytes:
            raise CheckError(f"tensor {spec.name!r}: {total} bytes would be copied, and the plan has {spec.nbytes}")
    if len(run.places) > 1 and total <= hold:
        buffer = memoryview(bytearray(total))
        for _, _ in _read(flow, run.item, checksum, buffer):
            pass
        for place in (place for places in run.places for place in places):
            _put(flow, place, buffer, 0)
        return
    buffer = memoryview(bytearray(min(CHUNK, max((r.nbytes for r in run.item.inputs), default=1) or 1)))
    for places in run.places:
        for start, view in _read(flow, run.item, checksum, buffer):
            for place in places:
                _put(flow, place, view, start)


def _put(flow: Flow, place: Place, view: memoryview, start: int) -> None:
    writer, spec = place
    flow.check_stop()
    writer.write(spec.name, view, start=spec.at * spec.nbytes + start)
    flow.meter.advance(len(view))


def _read(flow: Flow, item: Item, checksum: _Checksum, buffer: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(position in the output, bytes) of the inputs, chunk by chunk. A range is checked and added to the checksum when
    it is read for the first time.

    A buffer that holds all the bytes is filled from front to back; a smaller one is reused for every chunk.
    """
    position, total = 0, sum(ref.nbytes for ref in item.inputs)
    for ref in item.inputs:
        first, crc = checksum.wants(ref), 0
        for start, size in _chunks(ref):
            flow.check_stop()
            view = buffer[position : position + size] if len(buffer) == total else buffer[:size]
            flow.origins[ref.origin].read_into(ref.tensor, view, start=start)
            if first:
                crc = zlib.crc32(view, crc)
                flow.check_source(ref, view)
            yield position, view
            position += size
        if first:
            checksum.add(crc)


def make(item: Item, origins: Mapping[str, ByteSource]) -> list[Buffer]:
    """The bytes of an item's outputs, made in memory and not checked."""
    inputs = [bytearray(ref.nbytes) for ref in item.inputs]
    for ref, buffer in zip(item.inputs, inputs, strict=True):
        origins[ref.origin].read_into(ref.tensor, memoryview(buffer), start=ref.start)
    if item.kernel == "copy":
        return [b"".join(inputs)]
    return list(load_kernel(item.kernel)(list(zip(item.inputs, inputs)), item.outputs, item.params))


def _compute(flow: Flow, item: Item) -> tuple[list[int], list[Buffer]]:
    """Run the kernel of one item. Returns (CRC-32 of each input, raw bytes of each output)."""
    flow.check_stop()
    inputs: list[bytearray] = []
    clean = True
    for ref in item.inputs:
        buffer = bytearray(ref.nbytes)
        flow.origins[ref.origin].read_into(ref.tensor, memoryview(buffer), start=ref.start)
        clean = flow.check_source(ref, buffer) and clean
        inputs.append(buffer)
    try:
        outputs = list(load_kernel(item.kernel)(list(zip(item.inputs, inputs)), item.outputs, item.params))
    except InputError as error:
        raise InputError(f"tensor {escape(item.inputs[0].tensor)!r}: {error.message}", hint=error.hint) from None
    for spec, data in zip(item.outputs, outputs, strict=True):
        if memoryview(data).nbytes != spec.nbytes:
            raise CheckError(f"kernel {item.kernel} made {memoryview(data).nbytes} bytes for {spec.name!r}, "
                             f"and the plan has {spec.nbytes}")  # fmt: skip
        if clean and spec.dtype in FLOAT_DTYPES and not all_finite(data, spec.dtype):
            raise CheckError(
                f"{item.kernel} made NaN or infinite values in {escape(spec.name)!r} from finite values",
                hint="The values do not fit the dtype of the output. Choose a wider --dtype.",
            )
    return [zlib.crc32(data) for data in inputs], outputs
