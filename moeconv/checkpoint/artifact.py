"""Artifacts: safetensors files of measurements, with their provenance as JSON in the metadata."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Protocol

from moeconv.checkpoint.safetensors_file import SafetensorsFile
from moeconv.checkpoint.strictjson import parse_json
from moeconv.errors import InputError
from moeconv.types import JsonObject


class Artifact(Protocol):
    """A file, or the files, of something that was measured."""

    label: str

    @property
    def metadata(self) -> dict[str, str]: ...


def read_metadata_json(file: Artifact, *, kind: str) -> JsonObject:
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


def artifact_metadata(kind: str, **fields: object) -> dict[str, str]:
    """The safetensors metadata of an artifact: its provenance as one JSON string."""
    return {"format": "pt", "moeconv": json.dumps({"kind": kind, **fields}, sort_keys=True)}
