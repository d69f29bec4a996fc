"""Overlays on disk: tensors that replace others in a plan, in a directory with one safetensors file per layer.

With one file per layer, no header grows with the number of layers, and a file is finished as soon as its layer is.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from moeconv.checkpoint.artifact import read_metadata_json
from moeconv.checkpoint.header import TensorRef
from moeconv.checkpoint.reader import Checkpoint
from moeconv.checkpoint.safetensors_file import SafetensorsFile
from moeconv.checkpoint.writer import ShardWriter, output_errors, sync_directory
from moeconv.errors import InputError, MoeconvError, OutputError, escape
from moeconv.types import JsonObject

Layout = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


class Overlay:
    """An overlay opened for reading: a directory of safetensors files, or one such file.

    Raises InputError if there is no such file, or a tensor is in two of them.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.label = path, escape(path.name)
        if path.is_dir():
            names = sorted(entry.name for entry in os.scandir(path) if entry.name.endswith(".safetensors"))
            self.files = [SafetensorsFile(path / name) for name in names]
        else:
            self.files = [SafetensorsFile(path)]
        if not self.files:
            raise InputError(f"{self.label} holds no safetensors file", hint="Make the overlay again.")
        self._of = {name: file for file in self.files for name in file.tensors}
        if len(self._of) != sum(len(file.tensors) for file in self.files):
            raise InputError(f"{self.label} holds a tensor in two files", hint="Make the overlay again.")
        self.tensors: dict[str, TensorRef] = {name: file.tensors[name] for name, file in self._of.items()}

    @property
    def metadata(self) -> dict[str, str]:
        """The overlay's provenance, which is the same in every file."""
        return self.files[0].metadata

    def read_into(self, name: str, view: memoryview, *, start: int = 0) -> None:
        """Fill `view` with the bytes of tensor `name` from byte `start` of the tensor on."""
        self._of[name].read_into(name, view, start=start)

    def read(self, name: str) -> bytearray:
        """All bytes of one tensor."""
        return self._of[name].read(name)


def provenance(overlay: Overlay | SafetensorsFile, *, identity: str, checkpoint: Checkpoint, hint: str) -> JsonObject:
    """The record of how an overlay was made.

    Raises InputError if it was made for another checkpoint than the one with this `identity`.
    """
    made_with = read_metadata_json(overlay, kind="overlay")
    if made_with.get("identity") != identity:
        raise InputError(f"{overlay.label} was made for another checkpoint than {escape(checkpoint.path)}", hint=hint)
    return made_with


class OverlayWriter:
    """Writes the tensors of an overlay in any order. Each file is open from its first written tensor to its last."""

    def __init__(self, folder: Path, layouts: Mapping[Hashable, list[Layout]], metadata: Mapping[str, str]) -> None:
        self._folder, self._layouts, self._metadata = folder, dict(layouts), metadata
        self._key = {name: key for key, layout in layouts.items() for name, _, _ in layout}
        self._missing = {key: len(layout) for key, layout in layouts.items()}
        self._open: dict[Hashable, ShardWriter] = {}
        self._number = {key: i for i, key in enumerate(layouts)}

    def write(self, name: str, data: bytes | bytearray | memoryview) -> None:
        """Write all bytes of a tensor."""
        key = self._key.pop(name)
        if key not in self._open:
            self._open[key] = ShardWriter(self._path(key), self._layouts.pop(key), metadata=self._metadata)
        self._open[key].write(name, data)
        self._missing[key] -= 1
        if not self._missing[key]:
            self._open.pop(key).finish()

    def keep(self, keys: Collection[Hashable]) -> None:
        """Take the complete files of these keys from an interrupted run, and remove all others that it left."""
        for key in keys:
            for name, _, _ in self._layouts.pop(key):
                del self._key[name]
        names = {self._path(key).name for key in keys}
        for entry in os.scandir(self._folder):
            if entry.name not in names:
                os.unlink(entry.path)

    def complete(self, key: Hashable) -> bool:
        """Whether the file of a key, which has tensors, is there with all of them."""
        if key not in self._layouts:
            return False
        with contextlib.suppress(OSError, MoeconvError):
            found = SafetensorsFile(self._path(key)).tensors
            return all(n in found and found[n].shape == shape for n, _, shape in self._layouts[key])
        return False

    def _path(self, key: Hashable) -> Path:
        return self._folder / f"{self._number[key]:05d}.safetensors"

    def finish(self) -> None:
        if self._key:
            raise ValueError(f"{self._folder.name}: tensor {next(iter(self._key))!r} was not written")
        sync_directory(self._folder)

    def close(self) -> None:
        for writer in self._open.values():
            writer.close()


@contextmanager
def writing_overlay(
    path: Path, tensors: Iterable[tuple[Hashable, Layout]], *, metadata: Mapping[str, str], overwrite: bool = False,
    resumes: bool = False,
) -> Iterator[OverlayWriter]:  # fmt: skip
    """A context manager with an OverlayWriter for `tensors`, which are (layer, layout) of each tensor.

    The directory is moved to `path` when the block ends without an exception. With `resumes`, it is otherwise left for
    the next call, which takes what `OverlayWriter.keep` names. Raises OutputError if `path` exists and
    `overwrite` is false.
    """
    if path.exists() and not overwrite:
        raise OutputError(f"{escape(path)} exists already", hint="Remove it, or pass --overwrite.")
    layouts: dict[Hashable, list[Layout]] = {}
    for layer, layout in tensors:
        layouts.setdefault(layer, []).append(layout)
    temporary = path.with_name(f".{path.name}.begun" if resumes else f".{path.name}.{os.getpid()}.tmp")
    with output_errors(path):
        temporary.mkdir(exist_ok=resumes)
    writer = OverlayWriter(temporary, layouts, metadata)
    try:
        yield writer
        writer.finish()
        with output_errors(path):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.exists():
                path.unlink()
            os.rename(temporary, path)
        sync_directory(path.parent)
    except BaseException:
        writer.close()
        if not resumes:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
