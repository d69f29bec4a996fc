"""A checkpoint on disk: config, index against headers, byte ranges, and the two fingerprints.

Reads with pread, so nothing that was read stays in this process's memory. Never opens a file outside the directory.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from moeconv.checkpoint.header import TensorInfo, header_length, parse_header
from moeconv.checkpoint.strangers import refusal
from moeconv.checkpoint.strictjson import canonical_json, index_limits, parse_json, read_json_object
from moeconv.errors import InputError, escape

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MANIFEST_NAME = "moeconv_manifest.json"
_SAMPLE_BYTES = 4096
_SAMPLES_PER_SHARD = 16
_CHUNK = 1 << 22
_HUB_CACHE = re.compile(r"models--([\w.-]+)--([\w.-]+)$")


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where a tensor lies: `start` is the absolute byte offset in shard `shard`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start: int
    nbytes: int


class SafetensorsFile:
    """One safetensors file: `tensors`, `metadata`, and byte reads. Raises InputError on a damaged header.

    No descriptor stays open between reads (a checkpoint may have a thousand shards), so every read checks that the
    file is still the one whose header was parsed.
    """

    def __init__(self, path: Path, *, label: str | None = None) -> None:
        self.path = path
        self.label = escape(label or path.name)
        with self._opened() as fd:
            status = os.fstat(fd)
            self._status = (status.st_ino, status.st_size, status.st_mtime_ns)
            self._header = header_length(os.pread(fd, 8, 0), file_size=self.size, file=self.label)
            header = bytearray(self._header)
            self._fill(fd, 8, memoryview(header))
        parsed = parse_header(header, file_size=self.size, file=self.label)
        self.tensors: dict[str, TensorInfo] = parsed[0]
        self._metadata: dict[str, str] = parsed[1]

    @property
    def header_bytes(self) -> bytes:
        """The header's JSON, read again: of a large model it would be as large in memory as what was parsed."""
        data = bytearray(self._header)
        self.read_at(8, memoryview(data))
        return bytes(data)

    @property
    def metadata(self) -> dict[str, str]:
        return self._metadata

    @property
    def size(self) -> int:
        return self._status[1]

    @property
    def mtime_ns(self) -> int:
        return self._status[2]

    @contextmanager
    def _opened(self) -> Iterator[int]:
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise InputError(
                f"{self.label} is missing", hint="The checkpoint is incomplete; download it again."
            ) from None
        except OSError as error:
            raise InputError(f"cannot open {self.label}: {error.strerror}", hint="Check its permissions.") from None
        try:
            yield fd
        finally:
            os.close(fd)

    def _fill(self, fd: int, start: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            try:
                n = os.preadv(fd, [view[done : done + (1 << 30)]], start + done)
            except OSError as error:
                raise InputError(
                    f"cannot read {self.label} at byte {start + done}: {error.strerror}", hint="Is the disk healthy?"
                ) from None
            if n == 0:
                raise InputError(
                    f"{self.label} ends at byte {start + done} before a tensor does",
                    hint="The file was truncated; download it again.",
                )
            done += n

    def read_at(self, start: int, view: memoryview) -> None:
        """Fill `view` from absolute offset `start`. Raises InputError when the file changed since it was opened."""
        with self._opened() as fd:
            status = os.fstat(fd)
            if (status.st_ino, status.st_size, status.st_mtime_ns) != self._status:
                raise InputError(f"{self.label} changed while it was being read", hint="Run the command again.")
            self._fill(fd, start, view)

    def advise(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Tell the system that byte ranges [start, end) of the file are read next."""
        if not hasattr(os, "posix_fadvise"):
            return
        joined: list[list[int]] = []
        for start, end in sorted(ranges):
            if joined and start <= joined[-1][1] + _CHUNK:
                joined[-1][1] = max(joined[-1][1], end)
            else:
                joined.append([start, end])
        with contextlib.suppress(OSError, InputError), self._opened() as fd:
            for start, end in joined:
                os.posix_fadvise(fd, start, end - start, os.POSIX_FADV_WILLNEED)

    def read_into(self, name: str, view: memoryview, *, start: int = 0) -> None:
        """Fill `view` with the bytes of tensor `name` from byte `start` of the tensor on."""
        info = self.tensors[name]
        if start < 0 or start + len(view) > info.nbytes:
            raise ValueError(f"range {start}+{len(view)} is outside tensor {name!r} of {info.nbytes} bytes")
        self.read_at(info.start + start, view)

    def read(self, name: str) -> bytearray:
        """All bytes of one tensor."""
        buffer = bytearray(self.tensors[name].nbytes)
        self.read_into(name, memoryview(buffer))
        return buffer


_following: ContextVar[bool] = ContextVar("following", default=False)


@contextmanager
def follow_links(allowed: bool = True) -> Iterator[None]:
    """Let checkpoints that are opened in this block hold links that leave their directory, as old downloads into a
    local directory do. With `allowed` false the block changes nothing."""
    token = _following.set(allowed or _following.get())
    try:
        yield
    finally:
        _following.reset(token)


def allowed_root(directory: Path) -> Path:
    """Where links of a checkpoint may lead: its directory, or its own repository in a hub cache."""
    real = Path(os.path.realpath(directory))
    if real.parent.name == "snapshots" and (real.parent.parent / "blobs").is_dir():
        return real.parent.parent
    return real


def _confined(directory: Path, root: Path | None, name: str, *, what: str) -> Path:
    """The path of a file that a checkpoint names. Raises InputError unless it is a plain name inside `directory`, and
    where it is a link that leads out of `root` (None: anywhere)."""
    plain = name and name not in (".", "..") and not any(c in name for c in "/\\\0") and name.isprintable()
    if not plain:
        raise InputError(
            f"{what} names {escape(name)!r}, which is not a plain file name in the checkpoint's own directory",
            hint="Nothing outside the checkpoint is read; the index is damaged or hostile.",
        )
    path = directory / name
    real = Path(os.path.realpath(path))
    if root is not None and real != root / real.name and root not in real.parents:
        raise InputError(
            f"{escape(name)} is a link that leaves the checkpoint's directory, to {escape(real)}",
            hint="Pass --follow-links (follow_links in Python and recipes) if you trust where it leads, or copy the "
            "file into the directory.",
        )
    if os.path.islink(path) and not os.path.exists(path):
        raise InputError(
            f"{escape(name)} is a link to {escape(real)}, where nothing is",
            hint="Download the checkpoint again: what the link led to is gone.",
        )
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{escape(name)} is not a regular file", hint="The checkpoint is damaged or hostile.")
    return path


def hub_name(path: Path) -> str | None:
    """OWNER/NAME of a snapshot in the hub's cache, else None."""
    for part in path.absolute().parts:
        if match := _HUB_CACHE.match(part):
            return f"{match[1]}/{match[2]}"
    return None


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
                hint="Give a local checkpoint directory, or hf://OWNER/NAME for the hub.",
            )
        if not os.path.isdir(path):
            raise InputError(f"{escape(path)} is not a directory", hint="Give the directory that holds config.json.")
        self._root = None if follow_links or _following.get() else allowed_root(self.path)
        self._lock = threading.Lock()
        self._files: dict[str, SafetensorsFile] = {}
        self.stored_names: Mapping[str, str] = {}  # names in the shards of tensors that are called otherwise here
        if not os.path.lexists(self.path / CONFIG_NAME):
            raise refusal(self.path, self._entries(), lacks=f": {CONFIG_NAME} is missing")
        config_path = _confined(self.path, self._root, CONFIG_NAME, what="moeconv")
        self.config: dict[str, Any] = read_json_object(config_path, what=escape(config_path), constants=True)
        self._weight_map = self._read_index()
        self.tensors: Mapping[str, TensorRef] = self._read_headers()

    @property
    def follows_links(self) -> bool:
        """Whether its files may be links that leave the directory."""
        return self._root is None

    # -- opening -------------------------------------------------------------------------------------------------

    def _read_index(self) -> dict[str, str] | None:
        """The index's weight map, or None for a single-file checkpoint."""
        index_path = self.path / INDEX_NAME
        if not index_path.exists() and not index_path.is_symlink():
            if (self.path / SINGLE_NAME).exists() or (self.path / SINGLE_NAME).is_symlink():
                return None
            lacks = f" has neither {INDEX_NAME} nor {SINGLE_NAME}"
            raise refusal(self.path, self._entries(), lacks=lacks)
        index_path = _confined(self.path, self._root, INDEX_NAME, what="moeconv")
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
                hint="Keep the one that is meant, and move the other away.",
            )
        return weight_map

    def _entries(self) -> list[os.DirEntry[str]]:
        """What the directory holds, by name."""
        try:
            with os.scandir(self.path) as entries:
                return sorted(entries, key=lambda e: e.name)
        except OSError as error:
            raise InputError(f"cannot list {escape(self.path)}: {error.strerror}", hint="Check permissions.") from None

    def _backing(self) -> int:
        """Bytes of all shards that lie there, whatever the index says."""
        size = 0
        for entry in self._entries():
            with suppress(OSError):
                size += entry.stat().st_size if entry.name.endswith(".safetensors") else 0
        return size

    def _read_headers(self) -> dict[str, TensorRef]:
        self.shards: tuple[str, ...] = (
            (SINGLE_NAME,) if self._weight_map is None else tuple(sorted(set(self._weight_map.values())))
        )
        tensors: dict[str, TensorRef] = {}
        for shard in self.shards:
            file = self._open(shard)
            for info in file.tensors.values():
                if self._weight_map is not None and self._weight_map.get(info.name) != shard:
                    told = self._weight_map.get(info.name)
                    where = f"places it in {escape(told)}" if told else "does not name it"
                    raise InputError(
                        f"{escape(shard)} holds tensor {escape(info.name)!r}, but the index {where}",
                        hint="Index and shards are of different versions; download the checkpoint again.",
                    )
                tensors[info.name] = TensorRef(info.name, info.dtype, info.shape, shard, info.start, info.nbytes)
        if self._weight_map is not None:
            lost = [name for name in self._weight_map if name not in tensors]
            if lost:
                raise InputError(
                    f"the index names tensor {escape(lost[0])!r} ({len(lost)} in all), but "
                    f"{escape(self._weight_map[lost[0]])} does not hold it",
                    hint="Index and shards are of different versions; download the checkpoint again.",
                )
        stray = [e.name for e in self._entries() if e.name.endswith(".safetensors") and e.name not in self.shards]
        if stray:
            self.warnings.append(f"not named by the index, left out: {', '.join(escape(n) for n in stray[:4])}")
        return tensors

    def _open(self, shard: str) -> SafetensorsFile:
        with self._lock:
            file = self._files.get(shard)
            if file is None:
                path = _confined(self.path, self._root, shard, what=INDEX_NAME)
                if not shard.endswith(".safetensors"):
                    raise InputError(
                        f"{INDEX_NAME} names {escape(shard)}, which is not a .safetensors file",
                        hint="Pickled weights can run code; convert them to safetensors first.",
                    )
                file = self._files[shard] = SafetensorsFile(path, label=shard)
            return file

    def renamed(self, names: Mapping[str, str], warning: str) -> Checkpoint:
        """This checkpoint with other names for some of its tensors, {name here: new name}, and a `warning` of it."""
        other = copy.copy(self)
        other.warnings = [*self.warnings, warning]
        other.tensors = {
            names.get(name, name): replace(ref, name=names.get(name, name)) for name, ref in self.tensors.items()
        }
        other.stored_names = {new: self.stored_names.get(old, old) for old, new in names.items()}
        return other

    # -- reading -------------------------------------------------------------------------------------------------

    def read_into(self, name: str, view: memoryview, *, start: int = 0) -> None:
        """Fill `view` with the bytes of tensor `name` from byte `start` of the tensor on."""
        self._open(self.tensors[name].shard).read_into(self.stored_names.get(name, name), view, start=start)

    def read(self, name: str, *, start: int = 0, length: int | None = None) -> bytearray:
        """Bytes of tensor `name`, whole or a range of it."""
        buffer = bytearray(self.tensors[name].nbytes - start if length is None else length)
        self.read_into(name, memoryview(buffer), start=start)
        return buffer

    def advise(self, names: Iterable[str]) -> None:
        """Tell the system that these tensors are read next, so that it may bring them into its cache: a hint, which
        takes no memory of this process and fails in silence."""
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

    @property
    def name(self) -> str:
        """What people call it: NAME of the hub's OWNER/NAME, else the directory's name."""
        found = hub_name(self.path)
        return found.partition("/")[2] if found else self.path.resolve().name

    def beside(self) -> dict[str, bool]:
        """Names of all that lies in the directory beside the shards, and whether each is a regular file."""
        return {entry.name: entry.is_file() for entry in self._entries() if entry.name not in self.shards}

    def inside(self, folder: str) -> list[str]:
        """FOLDER/NAME of the regular files in a directory of the checkpoint, by name."""
        with contextlib.suppress(OSError), os.scandir(self.path / folder) as entries:
            return sorted(f"{folder}/{entry.name}" for entry in entries if entry.is_file())
        return []

    def confined(self, name: str) -> Path:
        """The path of NAME or FOLDER/NAME. Raises InputError for a link that leaves the directory."""
        folder, _, file = name.rpartition("/")
        return _confined(self.path / folder, self._root, file, what="the directory")

    # -- fingerprints --------------------------------------------------------------------------------------------

    @cached_property
    def manifest(self) -> dict[str, Any] | None:
        """The manifest of a checkpoint that moeconv wrote, else None."""
        path = self.path / MANIFEST_NAME
        if not path.is_file():
            return None
        return read_json_object(_confined(self.path, self._root, MANIFEST_NAME, what="moeconv"), what=MANIFEST_NAME)

    def identity(self, whole: Iterable[str] = ()) -> str:
        """Portable fingerprint (hex sha256) that statistics and manifests refer to.

        The manifest's hash when there is one and its shard sizes still match; else config, headers, the bytes of the
        tensors named in `whole` (routers) and fixed 4 KiB samples of every shard.
        """
        manifest = self.manifest
        if manifest is not None and self._manifest_fits(manifest):
            return hashlib.sha256(canonical_json(manifest)).hexdigest()
        digest = hashlib.sha256(canonical_json(self.config))
        for shard in self.shards:
            file = self._open(shard)
            digest.update(file.header_bytes)
            for i in range(_SAMPLES_PER_SHARD):
                start = (file.size - min(file.size, _SAMPLE_BYTES)) * i // (_SAMPLES_PER_SHARD - 1)
                view = memoryview(bytearray(min(file.size, _SAMPLE_BYTES)))
                file.read_at(start, view)
                digest.update(view)
        for name in sorted(whole):
            digest.update(self.read(name))
        return digest.hexdigest()

    def _manifest_fits(self, manifest: dict[str, Any]) -> bool:
        files = manifest.get("files")
        if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
            return False
        return all(files.get(shard, {}).get("bytes") == self._open(shard).size for shard in self.shards)

    def resume_state(self) -> list[tuple[str, int, int]]:
        """(name, size, mtime in ns) of config and every shard: what a resumed run must find unchanged."""
        status = os.stat(self.path / "config.json")
        state = [("config.json", status.st_size, status.st_mtime_ns)]
        state += [(s, self._open(s).size, self._open(s).mtime_ns) for s in self.shards]
        return state

    @property
    def nbytes(self) -> int:
        return sum(ref.nbytes for ref in self.tensors.values())


class Artifact(Protocol):
    """A file, or the files, of something that was measured."""

    label: str

    @property
    def metadata(self) -> dict[str, str]: ...


def read_metadata_json(file: Artifact, *, kind: str) -> dict[str, Any]:
    """The provenance object of a moeconv artifact (statistics, overlay). Raises InputError for another kind."""
    text = file.metadata.get("moeconv", "")
    value = parse_json(text.encode(), what=f"{file.label}: metadata") if text else None
    if not isinstance(value, dict) or value.get("kind") != kind:
        raise InputError(f"{file.label} is not a moeconv {kind} file", hint=f"Make one with the command for {kind}.")
    return value


def is_artifact(path: str | os.PathLike[str], *kinds: str) -> bool:
    """Whether a file is a moeconv artifact of one of these kinds."""
    try:
        text = SafetensorsFile(Path(path)).metadata.get("moeconv", "")
        value = parse_json(text.encode(), what="metadata") if text else None
    except InputError:
        return False
    return isinstance(value, dict) and value.get("kind") in kinds


def artifact_metadata(kind: str, **fields: Any) -> dict[str, str]:
    """The safetensors metadata of an artifact: its provenance as one JSON string."""
    return {"format": "pt", "moeconv": json.dumps({"kind": kind, **fields}, sort_keys=True)}
