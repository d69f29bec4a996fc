"""`moeconv import` from start to end: a plan, and the loop that applies it."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from moeconv.checkpoint.gguf_source import GgufSource
from moeconv.checkpoint.reader import CONFIG_NAME, SINGLE_NAME, Checkpoint
from moeconv.checkpoint.target import check_apart
from moeconv.families.model import Model
from moeconv.importing.planner import ORIGIN, plan_import
from moeconv.plan.meter import Meter
from moeconv.requests import ImportRequest
from moeconv.runner.run import run_plan
from moeconv.types import JsonObject

_NO_TENSORS = b"\x02\0\0\0\0\0\0\0{}"


def import_gguf_file(request: ImportRequest, *, meter: Meter) -> JsonObject:
    """Write a GGUF file as a transformers checkpoint. Raises InputError for a file that cannot become one."""
    source = GgufSource(request.gguf)
    plan, model = plan_import(source, request.plan)
    check_apart(request.out, [("GGUF", request.gguf)], staging=True)
    with tempfile.TemporaryDirectory(prefix="moeconv-import-") as folder:
        nothing = Model(_without_tensors(Path(folder) / source.path.stem, source), model.family, {}, ())
        return run_plan(plan, nothing, request.out, request.write, meter=meter, origins={ORIGIN: source})


def _without_tensors(folder: Path, source: GgufSource) -> Checkpoint:
    """The directory in which the writer looks for companion files, of which an import has none. Its files have the time
    of the GGUF file, so that an interrupted run resumes."""
    folder.mkdir()
    times = source.path.stat()
    for name, data in ((CONFIG_NAME, json.dumps({"gguf": source.size}).encode()), (SINGLE_NAME, _NO_TENSORS)):
        (folder / name).write_bytes(data)
        os.utime(folder / name, ns=(times.st_atime_ns, times.st_mtime_ns))
    return Checkpoint(folder)
