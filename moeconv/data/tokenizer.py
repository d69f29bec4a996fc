"""The tokenizer in the directory of a checkpoint: loads it, and compares two of them."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

from moeconv.checkpoint.companions import asks_for_code, has_vocabulary, is_companion_name
from moeconv.errors import InputError, escape, first_line
from moeconv.stream.silence import transformers_silenced

# A tokenizer of transformers, which has no types that would help here.
Tokenizer: TypeAlias = Any


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of transformers from a local directory, without the network and without running foreign code.

    Raises InputError if there is none, or if it cannot be loaded.
    """
    path = Path(directory)
    if not has_vocabulary(path):
        raise InputError(
            f"{escape(path.name)} has no tokenizer",
            hint="Copy tokenizer.json and tokenizer_config.json of the original model beside config.json.",
        )
    from transformers import AutoTokenizer

    try:
        with transformers_silenced():
            return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # A damaged or foreign tokenizer file can make transformers raise anything; all of it is about the input.
        reason = _broken(path) or first_line(error)
        raise InputError(
            f"the tokenizer of {escape(path.name)} cannot be loaded: {reason}", hint=_remedy(path)
        ) from error


def _broken(path: Path) -> str | None:
    """A message about the first JSON file that is not valid, because transformers does not name the file; None if all
    are valid."""
    for file in sorted(path.glob("*.json")):
        if is_companion_name(file.name):
            try:
                json.loads(file.read_bytes())
            except (ValueError, OSError) as error:
                return f"{escape(file.name)} is not valid JSON ({error})"
    return None


def _remedy(path: Path) -> str:
    """A hint for a tokenizer that cannot be loaded: it may be code, or need a package that is not installed."""
    if (path / "tokenizer.json").is_file():
        return "Copy the tokenizer files of the original model beside config.json."
    if asks_for_code(path):
        return (
            "This tokenizer is Python code in the checkpoint, which moeconv never runs. Save it as tokenizer.json with "
            "PreTrainedTokenizerFast of transformers, or use a model that has such a file."
        )
    sentencepiece = any(
        p.read_bytes()[:1] == b"\n" for p in path.glob("*.model")
    )  # a file of sentencepiece begins with this byte
    needed = ("sentencepiece", "google.protobuf") if sentencepiece else ("tiktoken",)
    lacking = [name for name in needed if not _installed(name)]
    if lacking:
        names = " ".join(name.removeprefix("google.") for name in lacking)
        return f"Its vocabulary needs a package that is not installed: run pip install {names}."
    return "Copy the tokenizer files of the original model beside config.json."


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def same_tokenizer(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether two checkpoints have the same tokenizer: the same tokenizer.json, or the same vocabulary."""
    files = [Path(directory) / "tokenizer.json" for directory in (one, other)]
    if all(f.is_file() for f in files) and files[0].read_bytes() == files[1].read_bytes():
        return True
    vocabularies = [load_tokenizer(directory).get_vocab() for directory in (one, other)]
    return vocabularies[0] == vocabularies[1]
