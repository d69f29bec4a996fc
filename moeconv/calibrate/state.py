"""The state from which an interrupted pass over a model resumes: the activations at a layer boundary, and the fields
so far.

It is kept in a hidden directory beside the file that the pass writes, and its size is that of one layer's activations.
These are the exact bytes of the stream, so that the result is the same, bit for bit, as that of an uninterrupted
run.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from moeconv import __version__
from moeconv.checkpoint.strictjson import canonical_json
from moeconv.checkpoint.writer import replace_file
from moeconv.data.windows import TokenData
from moeconv.errors import OutputError
from moeconv.plan.meter import Meter
from moeconv.stream.layers import LayerStream
from moeconv.world import all_agree, current, first, summed

Fields = dict[int, dict[str, np.ndarray]]

EVERY = 30.0  # seconds between two saves
_SHARE = (
    20.0  # a save is due after this many times its own duration, so that saving takes at most a twentieth of the time
)
_BLOCK = 1 << 24
_KEY, _FIELDS = "key", re.compile(r"layer-(\d+)\.npz")


def run_key(stream: LayerStream, read: TokenData, **settings: int) -> str:
    """A hash (hex sha256) of the exact computation: files, tokens, arithmetic, settings and versions."""
    state = {
        "versions": [__version__, torch.__version__],
        "files": stream.model.checkpoint.resume_state(),
        "windows": hashlib.sha256(np.ascontiguousarray(read.windows).tobytes()).hexdigest(),
        "sources": [[s.name, s.sha256, s.tokens] for s in read.sources],
        "arithmetic": [str(stream.dtype), stream.device.type, stream.batch_size, current().size],
        "settings": settings,
    }
    return hashlib.sha256(canonical_json(state)).hexdigest()


class SavedProgress:
    """Saves the state of a pass over a model, at most every `every` seconds (0: at every layer, None: never). Each
    process saves its own share of the windows: the activations of the stream and those `beside` them. A boundary can be
    resumed only if `whole` says of each MoE layer before it that all other results of that layer are there."""

    def __init__(
        self, target: Path, *, key: str, every: float | None, meter: Meter, whole: Callable[[int], bool] | None = None
    ) -> None:
        self.folder = target.absolute().with_name(f".{target.name}.moeconv-state")
        self.beside: list[torch.Tensor] = []
        self._key, self._every, self._meter, self._whole = key, every, meter, whole or (lambda _layer: True)
        self._saved_at, self._cost, self._written = time.monotonic(), 0.0, set[int]()

    def resume(self, stream: LayerStream) -> Fields:
        """Move the stream to the last boundary that all processes saved. Returns the fields of the layers before it. If
        nothing was saved for exactly this computation, returns no fields and leaves the stream unchanged."""
        if self._every is None:
            return {}
        world = current()
        fits = self._read(_KEY) == self._key.encode()
        if not all_agree(fits):
            first(lambda: shutil.rmtree(self.folder, ignore_errors=True))
            return {}
        boundary = self._common_boundary(stream)
        if not boundary:
            return {}
        with open(self._activations(boundary), "rb") as file:
            for view in self._views(stream):
                file.readinto(view)
        stream.skip_to(boundary)
        fields = self._fields(boundary) if world.leads else {}
        self._written = set(fields)
        self._meter.note(f"resuming after layer {boundary - 1}")
        return fields

    def save(self, stream: LayerStream, passed: int, fields: Fields) -> None:
        """Save the boundary after `passed` layers, if a save is due. If the disk refuses it, the run continues without
        saving."""
        if self._every is None:
            return
        due = max(self._every, _SHARE * self._cost) if self._every else 0.0
        if not first(lambda: time.monotonic() - self._saved_at >= due):
            return
        began = time.monotonic()
        problem = ""
        try:
            self._write(stream, passed, fields)
        except (OSError, OutputError) as error:
            problem = str(error)
        if not all_agree(not problem):
            self._every = None
            self._meter.note(
                f"the state cannot be saved, so an interrupted run would start again: "
                f"{problem or 'another process failed'}"
            )
            return
        self._forget(but=passed)
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - began

    def remove(self) -> None:
        """Delete the state when the work is done."""
        if current().leads:
            shutil.rmtree(self.folder, ignore_errors=True)

    # -- files -------------------------------------------------------------------------------------------------------

    def _activations(self, boundary: int) -> Path:
        return self.folder / f"hidden-{boundary}.{current().rank}"

    def _views(self, stream: LayerStream) -> list[memoryview]:
        return [_bytes_of(flow) for flow in (stream.hidden, *self.beside)]

    def _read(self, name: str) -> bytes | None:
        with suppress(OSError):
            return (self.folder / name).read_bytes()
        return None

    def _common_boundary(self, stream: LayerStream) -> int:
        """The last boundary for which every process has complete activations, and the first process all fields; or
        0."""
        layers = stream.model.num_layers
        here, size = torch.zeros(layers + 1, dtype=torch.int64), sum(view.nbytes for view in self._views(stream))
        for boundary in range(1, layers + 1):
            with suppress(OSError):
                here[boundary] = self._activations(boundary).stat().st_size == size
        if current().leads:
            found = {int(m[1]) for m in map(_FIELDS.fullmatch, os.listdir(self.folder)) if m}
            wanted = found.union(stream.model.moe_layers)  # a dense model has fields too where its FFNs lose neurons
            done = {layer for layer in found if self._whole(layer)}
            for boundary in range(1, layers + 1):
                here[boundary] *= all(layer in done for layer in wanted if layer < boundary)
        both = (summed(here) == current().size).nonzero().flatten().tolist()
        return max(both, default=0)

    def _fields(self, boundary: int) -> Fields:
        fields: Fields = {}
        for path in sorted(self.folder.glob("layer-*.npz"), key=lambda p: int(p.stem.partition("-")[2])):
            layer = int(path.stem.partition("-")[2])
            if layer < boundary:
                with np.load(path, allow_pickle=False) as arrays:
                    fields[layer] = {name: arrays[name] for name in arrays.files}
        return fields

    def _write(self, stream: LayerStream, passed: int, fields: Fields) -> None:
        self.folder.mkdir(exist_ok=True)
        if current().leads:
            for layer in fields.keys() - self._written:
                replace_file(self.folder / f"layer-{layer}.npz", _packed(fields[layer]))
                self._written.add(layer)
        target = self._activations(passed)
        temporary = target.with_name(f"{target.name}.tmp")
        with open(temporary, "wb") as file:
            for view in self._views(stream):
                for start in range(0, len(view), _BLOCK):
                    file.write(view[start : start + _BLOCK])
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        if self._read(_KEY) is None and current().leads:
            replace_file(self.folder / _KEY, self._key.encode())

    def _forget(self, *, but: int) -> None:
        for path in self.folder.glob(f"hidden-*.{current().rank}"):
            if path != self._activations(but):
                with suppress(OSError):
                    path.unlink()


def _bytes_of(hidden: torch.Tensor) -> memoryview:
    return hidden.view(torch.uint8).reshape(-1).numpy().data


def _packed(fields: Mapping[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **dict(fields))  # type: ignore[arg-type]
    return buffer.getvalue()
