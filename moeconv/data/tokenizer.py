"""The tokenizer that lies in a checkpoint's directory: load it, and tell whether two are the same."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from moeconv.errors import InputError, escape
from moeconv.stream.quiet import quiet

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def load_tokenizer(directory: str | os.PathLike[str]) -> Any:
    """transformers' tokenizer from a local directory, without network or foreign code.

    Raises InputError when there is none, or none that loads.
    """
    path = Path(directory)
    if not any((path / name).is_file() for name in _FILES):
        raise InputError(
            f"{escape(path.name)} has no tokenizer",
            hint="Copy tokenizer.json and tokenizer_config.json of the original model beside config.json.",
        )
    from transformers import AutoTokenizer

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # Whatever a damaged or foreign tokenizer file makes transformers raise: it is the input's fault.
        raise InputError(
            f"the tokenizer of {escape(path.name)} does not load: {_first_line(error)}",
            hint="Copy the tokenizer files of the original model beside config.json.",
        ) from error


def same_tokenizer(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether two checkpoints turn text into the same tokens: equal tokenizer.json, or equal vocabularies."""
    files = [Path(directory) / "tokenizer.json" for directory in (one, other)]
    if all(f.is_file() for f in files) and files[0].read_bytes() == files[1].read_bytes():
        return True
    vocabularies = [load_tokenizer(directory).get_vocab() for directory in (one, other)]
    return vocabularies[0] == vocabularies[1]


def _first_line(error: Exception) -> str:
    return escape((str(error) or type(error).__name__).strip().splitlines()[0][:300])
