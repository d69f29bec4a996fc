"""A GGUF file as a source: its metadata, its tensors, and reads of their bytes. Checked on opening."""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path
from typing import TypeAlias

from moeconv.checkpoint.gguf import GGML_TYPES
from moeconv.checkpoint.header import TensorRef, tensor_nbytes
from moeconv.errors import InputError, Unsupported, escape

MetadataValue: TypeAlias = bool | int | float | str | list[int] | list[float] | list[str]
_SAMPLE, _SAMPLES = 4096, 16
_HINT = "The file is damaged or incomplete: download it again."
_MAGIC = b"GGUF"


class GgufSource:
    """One GGUF file. `tensors` have row-major shapes; a tensor's dtype is ggml's name for its type."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        label = escape(self.path.name)
        try:
            from gguf import GGUFReader
        except ImportError:
            raise InputError("reading GGUF needs the gguf package", hint="Install it: pip install gguf") from None
        try:
            with open(self.path, "rb") as file:
                if file.read(4) != _MAGIC:
                    raise InputError(f"{label} is not a GGUF file", hint="Give a file that begins with GGUF.")
            self.size = self.path.stat().st_size
            self._reader = GGUFReader(self.path)
            self.metadata: dict[str, MetadataValue] = {
                str(key): field.contents() for key, field in self._reader.fields.items()
            }
            found = [
                (t.name, t.tensor_type.name, tuple(int(n) for n in reversed(t.shape)), int(t.data_offset))
                for t in self._reader.tensors
            ]
        except InputError:
            raise
        except OSError as error:
            raise InputError(f"cannot read {label}: {error.strerror or error}", hint="Check the path.") from None
        except Exception as error:  # the package raises many kinds of errors for damaged files
            reason = escape(str(error)[:200]) or type(error).__name__
            raise InputError(f"{label} is not a readable GGUF file: {reason}", hint=_HINT) from None
        if (parts := self.whole("split.count", 0, least=0)) > 1:
            raise Unsupported(f"{label} is one of {parts} parts", hint="Merge them: llama-gguf-split --merge.")
        self.tensors = {ref.name: ref for ref in (self._ref(label, *each) for each in found)}
        if len(self.tensors) != len(found):
            raise InputError(f"{label} has two tensors with the same name", hint=_HINT)

    def _ref(self, label: str, name: str, dtype: str, shape: tuple[int, ...], start: int) -> TensorRef:
        if dtype not in GGML_TYPES:
            raise Unsupported(
                f"{label}: tensor {escape(name)!r} has the type {dtype}, which moeconv does not read",
                hint=f"Types that are read: {', '.join(sorted(GGML_TYPES))}.",
            )
        try:
            nbytes = tensor_nbytes(dtype, shape)
        except ValueError as error:
            raise InputError(f"{label}: tensor {escape(name)!r}: {error}", hint=_HINT) from None
        if not shape or math.prod(shape) <= 0 or start < 0 or start + nbytes > self.size:
            raise InputError(f"{label}: tensor {escape(name)!r} is outside the file", hint=_HINT)
        return TensorRef(name, dtype, shape, self.path.name, start, nbytes)

    def whole(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number of the metadata. Raises InputError for anything else, and for one below `least`."""
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(
                f"{escape(self.path.name)}: {escape(key)} is {escape(value)}, but must be a whole number of {least} or "
                "more",
                hint=_HINT,
            )
        return value

    def read_into(self, name: str, view: memoryview, *, start: int = 0) -> None:
        """Fill `view` with the bytes of a tensor, beginning at byte `start` of the tensor."""
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.tensors[name].start + start)
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise InputError(f"{escape(self.path.name)} ended while it was read", hint=_HINT)
                done += count

    def identity(self) -> str:
        """A fingerprint (hex sha256) of the size, of the part before the tensors, and of samples of the tensors."""
        digest = hashlib.sha256(f"{self.size}\n".encode())
        begin = min((ref.start for ref in self.tensors.values()), default=self.size)
        with open(self.path, "rb") as file:
            digest.update(file.read(begin))
            for i in range(_SAMPLES):
                file.seek(begin + (max(0, self.size - _SAMPLE - begin)) * i // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE))
        return digest.hexdigest()
