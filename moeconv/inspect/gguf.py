"""Describes a GGUF file as the checkpoint that `moeconv import` makes of it, with the bytes and types of the file."""

from __future__ import annotations

import os

from moeconv.checkpoint.gguf_source import GgufSource
from moeconv.contract import Inspected
from moeconv.importing.planner import plan_import
from moeconv.inspect.run import inspect
from moeconv.options import ImportOptions


def is_gguf(path: str) -> bool:
    """Whether a path names a file (a checkpoint is a directory) that is called .gguf."""
    return path.lower().endswith(".gguf") and os.path.isfile(path)


def inspect_gguf(path: str) -> Inspected:
    """The JSON object of `moeconv inspect`. Raises Unsupported for a file that is not imported."""
    source = GgufSource(path)
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
