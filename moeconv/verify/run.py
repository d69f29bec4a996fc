"""Is a checkpoint whole: hashes against the manifest, headers against index and family, bytes against the source."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from moeconv.checkpoint.companions import is_companion_name
from moeconv.checkpoint.hashes import file_sha256
from moeconv.checkpoint.reader import MANIFEST_NAME, Checkpoint
from moeconv.errors import InputError, Unsupported, escape
from moeconv.families.model import Model, open_model
from moeconv.families.packed import stated_shape
from moeconv.inspect.unknown import unsupported_warning

_CHUNK = 1 << 22


def verify(path: str, *, source: str | None = None, load: bool = False) -> dict[str, Any]:
    """The JSON object of `moeconv verify`. `source` also compares every tensor that the last step left unchanged;
    `load` lets transformers load the model strictly. Raises InputError when the checkpoint cannot be opened at all."""
    problems: list[str] = []
    checkpoint = Checkpoint(path)
    model: Model | None = None
    unknown: list[str] = []
    try:
        model = open_model(checkpoint)
    except Unsupported as error:
        unknown.append(f"{unsupported_warning(error)}; its structure was not checked")
    except InputError as error:
        problems.append(error.message)
    problems += _check_hashes(checkpoint)
    if model is not None:
        problems += _check_states(model)
    if source is not None and model is not None:
        problems += _compare(model, open_model(source))
    loads: bool | None = None
    if load:
        from moeconv.verify.load import load_strict

        found = load_strict(path)
        damaged = model is None and not unknown  # loaders pass over parts that they do not miss
        loads = bool(found["ok"]) and not damaged
        problems += [f"transformers: {escape(p)}" for p in found["problems"]]
    return {
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


def _check_states(model: Model) -> list[str]:
    """What packed weights say of their own shapes, which no header shows, against config.json."""
    problems = []
    for name, stored in model.stored.items():
        try:
            said, wanted = stated_shape(model.checkpoint, stored), list(stored.shape)
        except InputError as error:
            problems.append(error.message)
            continue
        if said is not None and said not in (wanted, wanted[1:] if len(wanted) == 3 else wanted):
            problems.append(f"{escape(name)!r} says that its shape is {escape(said)[:80]}, config.json says {wanted}")
    return problems


def _check_hashes(checkpoint: Checkpoint) -> list[str]:
    """Every file of the manifest hashed again; files that the manifest does not name."""
    manifest = checkpoint.manifest
    if manifest is None:
        return []
    files = manifest.get("files")
    if not isinstance(files, dict):
        return [f"{MANIFEST_NAME} lists no files"]
    problems = []
    for name, entry in sorted(files.items()):
        plain = name not in ("", ".", "..") and ("/" not in name or is_companion_name(name))
        if not isinstance(entry, dict) or not plain:
            problems.append(f"{MANIFEST_NAME}: bad entry {escape(name)!r}")
            continue
        path = checkpoint.path / name
        if not os.path.isfile(path):
            problems.append(f"{escape(name)} is missing")
        elif (found := _hash(path)) != entry.get("sha256"):
            problems.append(f"{escape(name)} has changed since it was written (sha256 {found[:12]}...)")
    for shard in checkpoint.shards:
        if shard not in files:
            problems.append(f"{escape(shard)} is not in the manifest")
    return problems


def _hash(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise InputError(f"cannot read {escape(path.name)}: {error.strerror}", hint="Check permissions.") from None


def _compare(model: Model, source: Model) -> list[str]:
    """Tensors of roles that the last step did not change must hold the source's bytes."""
    steps = (model.checkpoint.manifest or {}).get("steps")
    if not isinstance(steps, list) or not steps or not isinstance(steps[-1], dict):
        return ["--source needs a checkpoint that moeconv wrote: it has no manifest"]
    if steps[-1].get("source") != source.identity:
        return ["the source given is not the one that this checkpoint was made from"]
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
