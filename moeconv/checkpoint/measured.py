"""Opens files of measurements (statistics, neurons, partitions), and checks their kind and version."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from moeconv.checkpoint.artifact import read_metadata_json
from moeconv.checkpoint.safetensors_file import SafetensorsFile
from moeconv.errors import InputError, escape
from moeconv.types import JsonObject


def open_measured(
    path: str | os.PathLike[str], *, kind: str, version: int, required: Sequence[str], make: str
) -> tuple[SafetensorsFile, JsonObject]:
    """(the file, its metadata, which has all `required` keys).

    Raises InputError if the file is missing, damaged, of another kind or of another version. `make` is the command that
    makes such a file, for the hint.
    """
    if not Path(path).exists():
        raise InputError(f"{escape(path)} does not exist", hint=f"Make it with `{make}`.")
    file = SafetensorsFile(Path(path))
    metadata = read_metadata_json(file, kind=kind)
    if metadata.get("version") != version or any(key not in metadata for key in required):
        raise InputError(
            f"{file.label} is a {kind} file of format {escape(metadata.get('version'))}, not {version}",
            hint="Make it again with this version.",
        )
    return file, metadata
