"""Downloads of models from the Hugging Face Hub, which are named hf://OWNER/NAME[@REVISION].

Only the files that a conversion needs are downloaded, into the cache of huggingface_hub.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from moeconv.checkpoint.companions import PATTERNS, TEMPLATES, asks_for_code
from moeconv.checkpoint.paths import HUB_NAME
from moeconv.checkpoint.reader import INDEX_NAME, SINGLE_NAME
from moeconv.checkpoint.strictjson import read_json_object
from moeconv.errors import InputError, UsageError, escape, first_line

_SHARD = re.compile(r"[\w.-]+\.safetensors")
_SMALL = ("*.json", "README.md", *PATTERNS)
ADAPTER_NAME = "adapter_model.safetensors"  # the factors of a LoRA adapter, as the peft library names them
_FOLDERS = "*/*"  # files in folders: the weights in other formats, or copies of them


def cache() -> str:
    """The directory in which huggingface_hub keeps downloaded files on this machine."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return HF_HUB_CACHE


def resolve(model: str) -> str:
    """The local directory of MODEL: `model` itself, or the downloaded snapshot of hf://OWNER/NAME[@REVISION].

    Raises UsageError for a malformed name, InputError if the model cannot be downloaded.
    """
    if not model.startswith("hf://"):
        return model
    match = HUB_NAME.match(model)
    if not match:
        raise UsageError(f"{escape(model)} is not hf://OWNER/NAME[@REVISION]", hint="Example: hf://Qwen/Qwen3-0.6B.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()  # they would fill a log with control characters
    try:
        path = snapshot_download(match[1], revision=match[2], allow_patterns=list(_SMALL), ignore_patterns=[_FOLDERS])
        # the directory's name is the commit; naming it makes the second download one of the same revision
        commit, shards = os.path.basename(path), _shards(Path(path))
        snapshot_download(match[1], revision=commit, allow_patterns=[*shards, f"{TEMPLATES}/*.jinja"])
        if asks_for_code(Path(path)):
            snapshot_download(match[1], revision=commit, allow_patterns=["*.py"], ignore_patterns=[_FOLDERS])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise InputError(
            f"cannot get {escape(model)} from the hub: {first_line(error)}",
            hint="Check the name, the network, and HF_TOKEN for gated models.",
        ) from None
    return path


def _shards(path: Path) -> list[str]:
    """The shards that the index names. Invalid names are skipped here: opening the checkpoint reports them."""
    if not (path / INDEX_NAME).exists():
        return [SINGLE_NAME, ADAPTER_NAME]
    weight_map = read_json_object(path / INDEX_NAME, what=INDEX_NAME).get("weight_map")
    named = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    return sorted(name for name in named if _SHARD.fullmatch(name)) or [SINGLE_NAME]
