"""Checks a checkpoint: hashes against the manifest, headers against index and family, bytes against the source."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from moeconv.checkpoint.companions import is_companion_name
from moeconv.checkpoint.hashes import file_sha256
from moeconv.checkpoint.reader import MANIFEST_NAME, Checkpoint
from moeconv.checkpoint.strictjson import read_json_object
from moeconv.contract import Verified
from moeconv.errors import InputError, Unsupported, escape
from moeconv.families.model import Model, open_model
from moeconv.families.packed import stated_shape, unknown_group
from moeconv.inspect.unknown import unsupported_warning
from moeconv.plan.meter import Meter, SilentMeter

_CHUNK = 1 << 22


def verify(
    path: str, *, source: str | None = None, load: bool = False, meter: Meter | None = None
) -> Verified:  # fmt: skip
    """The JSON object of `moeconv verify`.

    With `source`, every tensor that the last step left unchanged is compared with that checkpoint. With `load`,
    transformers loads the model strictly and runs it. Raises InputError if the checkpoint cannot be opened and has no
    manifest, which states what it was.
    """
    meter = meter or SilentMeter()
    problems: list[str] = []
    try:
        checkpoint = Checkpoint(path)
    except InputError as error:
        return _unopened(path, error, only_bytes=source is None and not load, meter=meter)
    model: Model | None = None
    unknown: list[str] = []
    try:
        model = open_model(checkpoint)
    except Unsupported as error:
        unknown.append(f"{unsupported_warning(error)}; its structure was not checked")
    except InputError as error:
        problems.append(error.message)
    problems += _check_hashes(checkpoint, meter)
    if model is not None:
        problems += _check_stated(model)
    if source is not None and model is not None:
        problems += _compare(model, open_model(source))
    loads: bool | None = None
    if load:
        meter.note("loading the model in transformers")
        from moeconv.verify.load import load_strict

        found = load_strict(path)
        damaged = model is None and not unknown  # loaders ignore damaged parts that they do not need
        loads = bool(found["ok"]) and not damaged
        problems += [f"transformers: {escape(p)}" for p in found["problems"]]
    return {
        "path": path,
        "ok": not problems,
        "problems": problems,
        "checked": {
            "shards": len(checkpoint.shards),
            "tensors": len(checkpoint.tensors),
            "bytes": checkpoint.nbytes,
        },
        "manifest": checkpoint.manifest is not None,
        "loads": {"transformers": loads},
        "warnings": [*(checkpoint.warnings if model is None else model.warnings), *unknown],
    }


def _check_stated(model: Model) -> list[str]:
    """Compares what packed weights store as data (their shapes, and the groups of their columns) with config.json and
    the headers."""
    problems = []
    for name, stored in model.stored.items():
        try:
            stated, wanted = stated_shape(model.checkpoint, stored), list(stored.shape)
        except InputError as error:
            problems.append(error.message)
            continue
        if stated is not None and stated not in (wanted, wanted[1:] if len(wanted) == 3 else wanted):
            problems.append(
                f"{escape(name)!r} states the shape {escape(stated)[:80]}, but config.json requires {wanted}"
            )
        if (group := unknown_group(model.checkpoint, stored)) is not None:
            problems.append(f"{escape(stored.parts['g_idx'])!r} names the group {group}, which has no scales")
    return problems


def _check_hashes(checkpoint: Checkpoint, meter: Meter) -> list[str]:
    """Hashes every file of the manifest again, and looks for shards that the manifest does not name."""
    manifest = checkpoint.manifest
    if manifest is None:
        return []
    files = manifest.get("files")
    if not isinstance(files, dict):
        return [f"{MANIFEST_NAME} lists no files"]
    problems = _check_files(checkpoint.path, files, meter)
    return problems + [f"{escape(shard)} is not in the manifest" for shard in checkpoint.shards if shard not in files]


def _is_plain(name: str) -> bool:
    """Whether a manifest may name such a file: it lies in the checkpoint's own directory."""
    return name not in ("", ".", "..") and ("/" not in name or is_companion_name(name))


def _check_files(folder: Path, files: Mapping[str, object], meter: Meter) -> list[str]:
    """Hashes the `files` of a manifest again: {name: its entry}."""
    problems = []
    sizes = {n: (folder / n).stat().st_size for n in files if _is_plain(n) and os.path.isfile(folder / n)}
    meter.start(total_bytes=sum(sizes.values()), parts=len(sizes), unit="file")
    for name, entry in sorted(files.items()):
        if not isinstance(entry, dict) or not _is_plain(name):
            problems.append(f"{MANIFEST_NAME}: the entry {escape(name)!r} is not valid")
            continue
        path = folder / name
        if not os.path.isfile(path):
            problems.append(f"{escape(name)} is missing")
        elif (found := _hash(path, meter)) != entry.get("sha256"):
            problems.append(f"{escape(name)} has changed since it was written (sha256 {found[:12]}...)")
        meter.part_done()
    return problems


def _unopened(path: str, error: InputError, *, only_bytes: bool, meter: Meter) -> Verified:
    """The verdict on an output of moeconv that does not open: GGUF, of which the bytes are checked, or a damaged
    checkpoint. Raises `error` where no manifest states what the directory held, and for GGUF where more than the bytes
    is asked for."""
    try:
        files = read_json_object(Path(path) / MANIFEST_NAME, what=MANIFEST_NAME).get("files")
    except InputError:
        raise error from None
    if not isinstance(files, dict):
        raise error
    gguf = [name for name in files if name.endswith(".gguf")]
    if gguf and not only_bytes:
        raise error
    problems = _check_files(Path(path), files, meter)
    present = [Path(path) / name for name in files if os.path.isfile(Path(path) / name)]
    return {
        "path": path,
        "ok": bool(gguf) and not problems,
        "problems": problems if gguf else [error.message, *problems],
        "checked": {"shards": len(gguf), "tensors": 0, "bytes": sum(file.stat().st_size for file in present)},
        "manifest": True,
        "loads": {"transformers": None},
        "warnings": ["the bytes of GGUF files were checked against the manifest, and not their structure"] * bool(gguf),
    }


def _hash(path: Path, meter: Meter) -> str:
    try:
        return file_sha256(path, seen=meter.advance)
    except OSError as error:
        raise InputError(f"cannot read {escape(path.name)}: {error.strerror}", hint="Check permissions.") from None


def _compare(model: Model, source: Model) -> list[str]:
    """Compares the tensors of all roles that the last step did not change with those of the source, byte by byte."""
    steps = (model.checkpoint.manifest or {}).get("steps")
    if not isinstance(steps, list) or not steps or not isinstance(steps[-1], dict):
        return ["--source needs a checkpoint that moeconv wrote, but this one has no manifest"]
    if steps[-1].get("source") != source.identity:
        return ["the checkpoint given as --source is not the one from which this checkpoint was made"]
    listed = steps[-1].get("changed")
    changed = set(listed) if isinstance(listed, dict) else set()
    problems = []
    theirs, keys = source.checkpoint.tensors, {(r.key, r.layer, r.expert): n for n, r in source.roles.items()}
    for name, role in model.roles.items():
        ref = model.checkpoint.tensors[name]
        origin = keys.get((role.key, role.layer, role.expert))
        if role.group in changed or origin is None or theirs[origin].dtype != ref.dtype:
            continue
        try:
            same = theirs[origin].nbytes == ref.nbytes and _same_bytes(model, name, source, origin)
        except InputError as error:
            problems.append(error.message)
            continue
        if not same:
            problems.append(f"tensor {escape(name)!r} differs from the source's {escape(origin)!r}")
    return problems


def _same_bytes(model: Model, name: str, source: Model, origin: str) -> bool:
    total = model.checkpoint.tensors[name].nbytes
    for start in range(0, total, _CHUNK):
        length = min(_CHUNK, total - start)
        ours = model.checkpoint.read(name, start=start, length=length)
        if ours != source.checkpoint.read(origin, start=start, length=length):
            return False
    return True
