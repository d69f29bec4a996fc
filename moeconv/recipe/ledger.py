"""The ledger of a recipe: a file next to each output that records how it was made, so that a finished step is not run
again.

The key of an entry covers everything that decides the output: command, parameters, version, and the inputs' bytes. An
entry also has the state of the output when the step ended; if the output changed since then, the step is run again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from moeconv import __version__
from moeconv.checkpoint.reader import MANIFEST_NAME
from moeconv.checkpoint.strictjson import canonical_json, read_json_object
from moeconv.checkpoint.writer import replace_file
from moeconv.errors import MoeconvError
from moeconv.options import reads_of
from moeconv.recipe.read import GROUPS, Step
from moeconv.recipe.source import identity_of
from moeconv.runner.run import open_resolved
from moeconv.types import JsonObject

_NAME = ".moeconv-ledger.json"


def kept_or_run(output: str, key: str, run: Callable[[], JsonObject]) -> tuple[JsonObject, bool]:
    """(result from the ledger, True) if `key` made `output` and the output has not changed since; otherwise (result of
    `run`, False)."""
    entry = _read(output).get(Path(output).name)
    if isinstance(entry, dict) and entry.get("key") == key and entry.get("came_to") == _state_of_output(output):
        return dict(entry["result"]), True
    os.makedirs(os.path.dirname(os.path.abspath(output)), exist_ok=True)
    result = run()
    entries = _read(output) | {Path(output).name: {"key": key, "came_to": _state_of_output(output), "result": result}}
    replace_file(_path(output), json.dumps(entries, default=str).encode())
    return result, False


def key_of(step: Step) -> str:
    """Hex sha256 of everything that decides the output of a step."""
    groups = GROUPS[step.command]
    models = [path for _, path in reads_of(step.parameters, *groups, kinds=("model",))]
    files = [path for kind in ("data", "file") for _, path in reads_of(step.parameters, *groups, kinds=(kind,))]
    inputs = [identity_of(step), *(open_resolved(path).identity for path in models)]
    return _hashed([__version__, step.command, dict(step.parameters), inputs, [_file_state(f) for f in files]])


def key_of_fused(first: Step, second: Step) -> str:
    """The key of two steps in one pass. The source of the second does not exist; the key of the first decides it."""
    return _hashed([key_of(first), second.command, dict(second.parameters)])


def _hashed(state: list[object]) -> str:
    # through JSON once, so that tuples and lists of the same values have the same key
    return hashlib.sha256(canonical_json(json.loads(json.dumps(state)))).hexdigest()


def _file_state(path: str) -> list[str | int]:
    """[path, bytes, mtime in ns]; the path alone where there is no such file."""
    try:
        status = os.stat(path)
    except OSError:
        return [path]
    return [path, status.st_size, status.st_mtime_ns]


def _state_of_output(path: str) -> str | None:
    """The hash of the manifest for a model, size and time for a file, None if it does not exist."""
    try:
        if os.path.isdir(path):
            return hashlib.sha256((Path(path) / MANIFEST_NAME).read_bytes()).hexdigest()
        return json.dumps(_file_state(path)) if os.path.exists(path) else None
    except OSError:
        return None


def _path(output: str) -> Path:
    return Path(os.path.abspath(output)).parent / _NAME


def _read(output: str) -> JsonObject:
    """The ledger next to an output. A missing or damaged ledger counts as empty, so that its steps run again."""
    try:
        return read_json_object(_path(output), what=_NAME)
    except MoeconvError:
        return {}
