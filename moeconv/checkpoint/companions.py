"""Which files beside the shards come along to an output: tokenizer, generation config, chat template, licence.

Everything else stays behind: other weight formats, code, and what a stranger may have left in the directory.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator
from pathlib import Path

from moeconv.checkpoint.reader import Checkpoint
from moeconv.checkpoint.strictjson import parse_json
from moeconv.errors import InputError, escape

_PATTERNS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "*.tiktoken", "spiece.model", "sentencepiece*.model",
    "vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json", "generation_config.json",
    "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json",
    *(_LICENCES := ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")),
)  # fmt: skip
_NEVER = ("*.py", "*.bin", "*.pth", "*.pt", "*.gguf", "*.onnx", "*.safetensors", "*.index.json", "*.exe", "*.so")
_MAX_BYTES = 256 * 1024 * 1024
_CODE_KEYS = ("auto_map",)


def is_licence(name: str) -> bool:
    """Whether a companion says what one may do with the model."""
    return any(fnmatch.fnmatchcase(name, p) for p in _LICENCES)


def _wanted(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, p) for p in _PATTERNS) and not any(
        fnmatch.fnmatchcase(name, p) for p in _NEVER
    )


def _without_code(name: str, data: bytes) -> bytes:
    """JSON that names Python files to import loses those names; anything else stays byte for byte."""
    if not name.endswith(".json") or not any(f'"{key}"'.encode() in data for key in _CODE_KEYS):
        return data
    value = parse_json(data, what=escape(name))
    if isinstance(value, dict) and any(key in value for key in _CODE_KEYS):
        kept = {k: v for k, v in value.items() if k not in _CODE_KEYS}
        return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()
    return data


def check_companions(checkpoint: Checkpoint) -> None:
    """Raises InputError when a companion file cannot come along; reads none of them."""
    for path in checkpoint.companions(_wanted):
        _check_size(path)


def _check_size(path: Path) -> None:
    if path.stat().st_size > _MAX_BYTES:
        raise InputError(f"{escape(path.name)} is too large to be a tokenizer file", hint="Remove it.")


def companions(checkpoint: Checkpoint) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of every companion file, in name order. Raises InputError for one that is too large."""
    for path in checkpoint.companions(_wanted):
        try:
            _check_size(path)
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {escape(path.name)}: {error.strerror}", hint="Check permissions.") from None
        yield path.name, _without_code(path.name, data)
