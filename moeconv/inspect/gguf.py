"""Describes a GGUF file as the checkpoint that `moeconv import` would write, with the bytes and types of the file."""

from __future__ import annotations

import os

from moeconv.checkpoint.gguf_source import GgufSource
from moeconv.contract import Inspected
from moeconv.importing.planner import plan_import
from moeconv.inspect.run import inspect
from moeconv.options import ImportOptions


def gguf_file(path: str) -> str | None:
    """The GGUF file that a path names: the file itself, or the only one of a directory without a checkpoint, such as
    `quantize --format gguf` writes. None if there is none or are several."""
    if path.lower().endswith(".gguf") and os.path.isfile(path):
        return path
    if not os.path.isdir(path) or os.path.exists(os.path.join(path, "config.json")):
        return None
    found = [name for name in os.listdir(path) if name.lower().endswith(".gguf")]
    return os.path.join(path, found[0]) if len(found) == 1 else None


def inspect_gguf(path: str, file: str) -> Inspected:
    """The JSON object of `moeconv inspect PATH`, where `file` is the GGUF file there. Raises Unsupported for one
    that is not imported."""
    source = GgufSource(file)
    plan, model = plan_import(source, ImportOptions())
    found = inspect(model)
    dtypes: dict[str, int] = {}
    for ref in source.tensors.values():
        dtypes[ref.dtype] = dtypes.get(ref.dtype, 0) + ref.nbytes
    by_role: dict[str, int] = {}
    for item in plan.items():
        by_role[item.changed] = by_role.get(item.changed, 0) + sum(part.nbytes for part in item.inputs)
    found |= {
        "path": path, "bytes": sum(dtypes.values()), "dtypes": dict(sorted(dtypes.items())),
        "bytes_by_role": by_role, "tensors": len(source.tensors), "shards": 1, "identity": source.identity(),
        "quantization": {"format": "gguf", "bits": None, "scheme": None, "roles": []},
    }  # fmt: skip
    return found
