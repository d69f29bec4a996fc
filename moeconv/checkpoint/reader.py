"""A checkpoint on disk: its config, the check of its index against the headers, reads of tensors, and two fingerprints.

Never opens a file outside the directory, unless links are followed on request.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from moeconv.checkpoint.paths import allowed_root, confined, hub_name, links_are_followed, on_hub
from moeconv.checkpoint.safetensors_file import SafetensorsFile, TensorRef
from moeconv.checkpoint.strangers import refusal
from moeconv.checkpoint.strictjson import canonical_json, index_limits, read_json_object
from moeconv.errors import InputError, escape
from moeconv.types import JsonObject

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MANIFEST_NAME = "moeconv_manifest.json"
SETTINGS_NAME = "hf_quant_config.json"  # of ModelOpt
_OLD_KEYS = ("exclude_modules", "kv_cache_quant_algo")  # in that file alone
_QUANTIZATION = "quantization_config"
_SAMPLE_BYTES = 4096
_SAMPLES_PER_SHARD = 16
_CHUNK = 1 << 22


class Checkpoint:
    """A directory of safetensors shards with a config.json, checked on opening. Thread-safe for reads.

    `follow_links` lets its files be links that leave the directory, as the block of `follow_links` does.
    """

    def __init__(self, path: str | os.PathLike[str], *, follow_links: bool = False) -> None:
        self.path = Path(path)
        self.warnings: list[str] = []
        if not os.path.exists(path):  # False also for a name that no file system can hold
            raise InputError(
                f"{escape(path)} does not exist",
                hint=f"Give a local checkpoint directory, or {on_hub(os.fspath(path))} for the hub.",
            )
        if not os.path.isdir(path):
            raise InputError(f"{escape(path)} is not a directory", hint="Give the directory that holds config.json.")
        self._root = None if follow_links or links_are_followed() else allowed_root(self.path)
        self._lock = threading.Lock()
        self._files: dict[str, SafetensorsFile] = {}
        self.stored_names: Mapping[str, str] = {}  # name here -> name in the shard, for renamed tensors
        if not os.path.lexists(self.path / CONFIG_NAME):
            raise refusal(self.path, self._entries(), lacks=f": {CONFIG_NAME} is missing")
        config_path = confined(self.path, self._root, CONFIG_NAME, what="moeconv")
        self.config: JsonObject = read_json_object(config_path, what=escape(config_path), constants=True)
        self._add_settings()
        weight_map = self._read_index()
        self.shards: tuple[str, ...] = (SINGLE_NAME,) if weight_map is None else tuple(sorted(set(weight_map.values())))
        self.tensors: Mapping[str, TensorRef] = self._read_headers(weight_map)

    @property
    def follows_links(self) -> bool:
        """Whether its files may be links that leave the directory."""
        return self._root is None

    # -- opening -------------------------------------------------------------------------------------------------

    def _add_settings(self) -> None:
        """Put the settings that older exports of ModelOpt have in a file of their own into the config, under the keys
        that newer ones have there."""
        if _QUANTIZATION in self.config or not (self.path / SETTINGS_NAME).exists():
            return
        path = confined(self.path, self._root, SETTINGS_NAME, what="moeconv")
        stated = read_json_object(path, what=escape(path)).get("quantization")
        if isinstance(stated, dict) and stated.get("quant_algo") is not None:
            kept = {key: value for key, value in stated.items() if key not in _OLD_KEYS}
            settings = {"quant_method": "modelopt", **kept, "ignore": stated.get("exclude_modules") or []}
            self.config = {**self.config, _QUANTIZATION: settings}

    def _read_index(self) -> dict[str, str] | None:
        """The index's weight map, or None for a single-file checkpoint."""
        index_path = self.path / INDEX_NAME
        if not index_path.exists() and not index_path.is_symlink():
            if (self.path / SINGLE_NAME).exists() or (self.path / SINGLE_NAME).is_symlink():
                return None
            lacks = f" has neither {INDEX_NAME} nor {SINGLE_NAME}"
            raise refusal(self.path, self._entries(), lacks=lacks)
        index_path = confined(self.path, self._root, INDEX_NAME, what="moeconv")
        index = read_json_object(index_path, what=escape(index_path), limits=index_limits(self._backing()))
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise InputError(f"{INDEX_NAME}: weight_map must map tensor names to files", hint="Download it again.")
        if not weight_map:
            raise InputError(f"{INDEX_NAME}: weight_map is empty", hint="Download it again.")
        if os.path.lexists(self.path / SINGLE_NAME) and set(weight_map.values()) != {SINGLE_NAME}:
            raise InputError(
                f"{escape(self.path)} holds both {SINGLE_NAME} and {INDEX_NAME} with shards of its own: transformers "
                f"loads {SINGLE_NAME} alone, other programs load the shards",
                hint="Keep the one that you mean, and move the other away.",
            )
        return weight_map

    def _entries(self) -> list[os.DirEntry[str]]:
        """The entries of the directory, sorted by name."""
        try:
            with os.scandir(self.path) as entries:
                return sorted(entries, key=lambda e: e.name)
        except OSError as error:
            raise InputError(f"cannot list {escape(self.path)}: {error.strerror}", hint="Check permissions.") from None

    def _backing(self) -> int:
        """Bytes of all shards in the directory, whether the index names them or not."""
        size = 0
        for entry in self._entries():
            with suppress(OSError):
                size += entry.stat().st_size if entry.name.endswith(".safetensors") else 0
        return size

    def _read_headers(self, weight_map: Mapping[str, str] | None) -> dict[str, TensorRef]:
        tensors: dict[str, TensorRef] = {}
        for shard in self.shards:
            found = self._open(shard).tensors
            wrong = [] if weight_map is None else [name for name in found if weight_map.get(name) != shard]
            if weight_map is not None and wrong:
                indexed = weight_map.get(wrong[0])
                where = f"places it in {escape(indexed)}" if indexed else "does not name it"
                raise InputError(
                    f"{escape(shard)} holds tensor {escape(wrong[0])!r}, but the index {where}",
                    hint="Index and shards are of different versions; download the checkpoint again.",
                )
            tensors.update(found)
        if weight_map is not None:
            lost = [name for name in weight_map if name not in tensors]
            if lost:
                raise InputError(
                    f"the index names tensor {escape(lost[0])!r} ({len(lost)} in all), but "
                    f"{escape(weight_map[lost[0]])} does not hold it",
                    hint="Index and shards are of different versions; download the checkpoint again.",
                )
        stray = [e.name for e in self._entries() if e.name.endswith(".safetensors") and e.name not in self.shards]
        if stray:
            self.warnings.append(
                f"ignored, because the index does not name them: {', '.join(escape(n) for n in stray[:4])}"
            )
        return tensors

    def _open(self, shard: str) -> SafetensorsFile:
        with self._lock:
            file = self._files.get(shard)
            if file is None:
                path = confined(self.path, self._root, shard, what=INDEX_NAME)
                if not shard.endswith(".safetensors"):
                    raise InputError(
                        f"{INDEX_NAME} names {escape(shard)}, which is not a .safetensors file",
                        hint="Pickled weights can run code; convert them to safetensors first.",
                    )
                file = self._files[shard] = SafetensorsFile(path, label=shard)
            return file

    def renamed(self, names: Mapping[str, str], warning: str) -> Checkpoint:
        """A copy of this checkpoint in which some tensors have other names, {old: new}, with one more `warning`."""
        other = copy.copy(self)
        other.warnings = [*self.warnings, warning]
        other.tensors = {
            names.get(name, name): replace(ref, name=names.get(name, name)) for name, ref in self.tensors.items()
        }
        other.stored_names = {new: self.stored_names.get(old, old) for old, new in names.items()}
        return other

    def chosen(self, names: Mapping[str, str]) -> Checkpoint:
        """A copy of this checkpoint that has only the tensors of `names`, {new name: old name}."""
        other = copy.copy(self)
        other.tensors = {new: replace(self.tensors[old], name=new) for new, old in names.items()}
        other.stored_names = {new: self.stored_names.get(old, old) for new, old in names.items()}
        return other

    # -- reading -------------------------------------------------------------------------------------------------

    def reworded(self, config: JsonObject, warning: str) -> Checkpoint:
        """A copy of this checkpoint with another config.json, and with one more `warning`."""
        other = copy.copy(self)
        other.warnings, other.config = [*self.warnings, warning], config
        return other

    def read_into(self, name: str, view: memoryview, *, start: int = 0) -> None:
        """Fill `view` with the bytes of tensor `name` from byte `start` of the tensor on."""
        self._open(self.tensors[name].shard).read_into(self.stored_names.get(name, name), view, start=start)

    def read(self, name: str, *, start: int = 0, length: int | None = None) -> bytearray:
        """Bytes of tensor `name`, whole or a range of it."""
        buffer = bytearray(self.tensors[name].nbytes - start if length is None else length)
        self.read_into(name, memoryview(buffer), start=start)
        return buffer

    def advise(self, names: Iterable[str]) -> None:
        """Tell the system that these tensors are read next, so that it can load them into its cache.

        This takes no memory of this process, and errors are ignored.
        """
        ranges: dict[str, list[tuple[int, int]]] = {}
        for ref in (self.tensors[name] for name in names):
            ranges.setdefault(ref.shard, []).append((ref.start, ref.start + ref.nbytes))
        for shard, found in ranges.items():
            self._open(shard).advise(found)

    def same_bytes(self, first: str, second: str) -> bool:
        """Whether two tensors are equal in dtype, shape and every byte; stops reading at the first difference."""
        a, b = self.tensors[first], self.tensors[second]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        ranges = ((start, min(_CHUNK, a.nbytes - start)) for start in range(0, a.nbytes, _CHUNK))
        return all(self.read(first, start=s, length=n) == self.read(second, start=s, length=n) for s, n in ranges)

    def is_zero(self, name: str) -> bool:
        """Whether every byte of a tensor is 0; stops reading at the first other one."""
        size = self.tensors[name].nbytes
        ranges = ((start, min(_CHUNK, size - start)) for start in range(0, size, _CHUNK))
        return not any(any(self.read(name, start=s, length=n)) for s, n in ranges)

    @property
    def name(self) -> str:
        """The NAME in OWNER/NAME for a snapshot in the hub's cache, else the name of the directory."""
        found = hub_name(self.path)
        return found.partition("/")[2] if found else self.path.resolve().name

    def beside(self) -> dict[str, bool]:
        """The names of everything in the directory except the shards, and whether each is a regular file."""
        return {entry.name: entry.is_file() for entry in self._entries() if entry.name not in self.shards}

    def inside(self, folder: str) -> list[str]:
        """FOLDER/NAME of the regular files in a directory of the checkpoint, by name."""
        with contextlib.suppress(OSError), os.scandir(self.path / folder) as entries:
            return sorted(f"{folder}/{entry.name}" for entry in entries if entry.is_file())
        return []

    def confined(self, name: str) -> Path:
        """The path of NAME or FOLDER/NAME. Raises InputError for a link that leaves the directory."""
        folder, _, file = name.rpartition("/")
        return confined(self.path / folder, self._root, file, what="the directory")

    # -- fingerprints --------------------------------------------------------------------------------------------

    @cached_property
    def manifest(self) -> JsonObject | None:
        """The manifest of a checkpoint that moeconv wrote; None for any other checkpoint."""
        path = self.path / MANIFEST_NAME
        if not path.is_file():
            return None
        return read_json_object(confined(self.path, self._root, MANIFEST_NAME, what="moeconv"), what=MANIFEST_NAME)

    def identity(self, whole: Iterable[str] = ()) -> str:
        """A fingerprint (hex sha256), the same on every machine, that statistics and manifests refer to.

        It is the manifest's hash if there is a manifest and its shard sizes still match. Otherwise it covers the
        config, the headers, all bytes of the tensors named in `whole` (routers), and samples of 4 KiB at fixed places
        of every shard.
        """
        manifest = self.manifest
        if manifest is not None and self._manifest_fits(manifest):
            return hashlib.sha256(canonical_json(manifest)).hexdigest()
        digest = hashlib.sha256(canonical_json(self.config))
        for shard in self.shards:
            file = self._open(shard)
            digest.update(file.header_bytes)
            size = min(file.size, _SAMPLE_BYTES)
            samples = memoryview(bytearray(size * _SAMPLES_PER_SHARD))
            starts = ((file.size - size) * i // (_SAMPLES_PER_SHARD - 1) for i in range(_SAMPLES_PER_SHARD))
            file.read_all((start, samples[i * size : (i + 1) * size]) for i, start in enumerate(starts))
            digest.update(samples)
        for name in sorted(whole):
            digest.update(self.read(name))
        return digest.hexdigest()

    def _manifest_fits(self, manifest: JsonObject) -> bool:
        files = manifest.get("files")
        if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
            return False
        return all(files.get(shard, {}).get("bytes") == self._open(shard).size for shard in self.shards)

    def resume_state(self) -> list[tuple[str, int, int]]:
        """(name, size, mtime in ns) of config.json and every shard. A run resumes only if this is unchanged."""
        status = os.stat(self.path / "config.json")
        state = [("config.json", status.st_size, status.st_mtime_ns)]
        state += [(s, self._open(s).size, self._open(s).mtime_ns) for s in self.shards]
        return state

    @property
    def nbytes(self) -> int:
        return sum(ref.nbytes for ref in self.tensors.values())
