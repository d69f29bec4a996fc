"""The tokenizer that lies in a checkpoint's directory: load it, and tell whether two are the same."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moeconv.checkpoint.companions import asks_for_code, has_vocabulary, is_companion_name
from moeconv.errors import InputError, escape, first_line
from moeconv.stream.silence import transformers_silenced


def load_tokenizer(directory: str | os.PathLike[str]) -> Any:
    """transformers' tokenizer from a local directory, without network or foreign code.

    Raises InputError when there is none, or none that loads.
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
        # Whatever a damaged or foreign tokenizer file makes transformers raise: it is the input's fault.
        said = _broken(path) or first_line(error)
        raise InputError(f"the tokenizer of {escape(path.name)} does not load: {said}", hint=_remedy(path)) from error


def _broken(path: Path) -> str | None:
    """What is wrong with the first of its JSON files that is none: transformers does not say which one it is."""
    for file in sorted(path.glob("*.json")):
        if is_companion_name(file.name):
            try:
                json.loads(file.read_bytes())
            except (ValueError, OSError) as error:
                return f"{escape(file.name)} is not valid JSON ({error})"
    return None


def _remedy(path: Path) -> str:
    """What helps where a tokenizer does not load: it may be code, or need a package that is not installed."""
    if (path / "tokenizer.json").is_file():
        return "Copy the tokenizer files of the original model beside config.json."
    if asks_for_code(path):
        return (
            "It is Python code beside the weights, which moeconv never runs: save it as tokenizer.json with "
            "transformers' PreTrainedTokenizerFast, or give a model with such a file."
        )
    sentencepiece = any(p.read_bytes()[:1] == b"\n" for p in path.glob("*.model"))  # the first field of its messages
    needed = ("sentencepiece", "google.protobuf") if sentencepiece else ("tiktoken",)
    lacking = [name for name in needed if not _installed(name)]
    if lacking:
        names = " ".join(name.removeprefix("google.") for name in lacking)
        return f"Its vocabulary needs a package that is not installed: pip install {names}."
    return "Copy the tokenizer files of the original model beside config.json."


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def same_tokenizer(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether two checkpoints turn text into the same tokens: equal tokenizer.json, or equal vocabularies."""
    files = [Path(directory) / "tokenizer.json" for directory in (one, other)]
    if all(f.is_file() for f in files) and files[0].read_bytes() == files[1].read_bytes():
        return True
    vocabularies = [load_tokenizer(directory).get_vocab() for directory in (one, other)]
    return vocabularies[0] == vocabularies[1]
