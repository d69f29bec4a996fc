"""Which files beside the shards come along to an output: tokenizer, processors, templates, generation config, licence.

One list for the loader of tokenizers and for the copier. Code comes along unread, and only where a file that comes
along names it; whatever else lies there stays behind and is named.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeconv.checkpoint.reader import INDEX_NAME, MANIFEST_NAME, Checkpoint
from moeconv.checkpoint.strictjson import parse_json, read_json_object
from moeconv.errors import InputError, escape

# files that hold a vocabulary: a directory without any of them has no tokenizer
VOCABULARIES = (
    "tokenizer.json", "tokenizer.*.json", "tokenizer.model", "tokenizer.model.*", "tiktoken.model", "*.tiktoken",
    "*tekken*.json", "vocab.json", "vocab.txt", "spiece.model", "spm.model", "spm_char.model", "sentencepiece*.model",
    "source.spm", "target.spm", "bpe.codes", "dict.txt", "byte_maps.json", "prophetnet.tokenizer", "vocab-src.json",
)  # fmt: skip
TEMPLATES = "additional_chat_templates"  # a directory of named chat templates
_BESIDE_VOCABULARIES = (
    "merges.txt", "vocab-tgt.json", "target_vocab.json", "entity_vocab.json", "emoji.json", "normalizer.json",
    "word_shape.json", "word_pronunciation.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_SETTINGS = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "audio_tokenizer_config.json", "modelcard.json",
)  # fmt: skip
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
PATTERNS = (*VOCABULARIES, *_BESIDE_VOCABULARIES, *_SETTINGS, *_LICENCES)
_NEVER = ("*.py", "*.bin", "*.pth", "*.pt", "*.gguf", "*.onnx", "*.safetensors", "*.index.json", "*.exe", "*.so")
# what a step writes anew or the reader has spoken of
_OWN = ("config.json", INDEX_NAME, MANIFEST_NAME, "README.md", "*.safetensors", ".*")
_MAX_BYTES = 256 * 1024 * 1024
_MAX_SETTINGS = 1 << 20  # of a JSON file that may name code
_SHOWN = 8
_CODE = "auto_map"
_MODEL_CLASSES = ("AutoConfig", "AutoModel", "TFAutoModel", "FlaxAutoModel")  # the beginnings of their keys
ENTRY = "modeling_moeconv"  # the module that loads packed weights written with --self-contained


def is_licence(name: str) -> bool:
    """Whether a companion says what one may do with the model."""
    return _matches(name, _LICENCES)


def has_vocabulary(directory: Path) -> bool:
    """Whether a directory holds a file that a tokenizer can be made of."""
    return any(path.is_file() for pattern in VOCABULARIES for path in directory.glob(pattern))


def is_companion_name(name: str) -> bool:
    """Whether a file of this name, which may be in the directory of templates, comes along by its name alone."""
    folder, _, file = name.rpartition("/")
    if folder:
        return folder == TEMPLATES and file.endswith(".jinja") and not file.startswith(".")
    return _matches(name, PATTERNS) and not _matches(name, _NEVER)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


# -- code ------------------------------------------------------------------------------------------------------------


def without_code(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """config.json without the entries of `auto_map` that name code for the config and the model, and those entries.

    Every family that a step takes is a class of transformers itself, so nothing needs that code: but for the loader
    of packed weights that moeconv wrote beside them.
    """
    named, result = config.get(_CODE), dict(config)
    if not isinstance(named, dict):
        result.pop(_CODE, None)
        return result, []
    packed = isinstance(config.get("quantization_config"), dict)
    gone = {
        key: value
        for key, value in named.items()
        if key.startswith(_MODEL_CLASSES) and not (packed and _modules(value) == [ENTRY])
    }
    kept = {key: value for key, value in named.items() if key not in gone}
    if kept:
        result[_CODE] = kept
    else:
        del result[_CODE]
    return result, [f"{escape(key)}: {escape(value)}" for key, value in gone.items()]


def _modules(value: Any) -> list[str]:
    """The Python modules of the checkpoint's own directory that an entry of `auto_map` names."""
    entries = value if isinstance(value, list) else [value]
    return [e.partition(".")[0] for e in entries if isinstance(e, str) and "." in e and "--" not in e and "/" not in e]


def _code_of(value: Any) -> set[str]:
    """The Python files beside it that a JSON value asks its reader to import."""
    named = value.get(_CODE) if isinstance(value, Mapping) else None
    return {f"{m}.py" for entry in named.values() for m in _modules(entry)} if isinstance(named, dict) else set()


def _asks_for_code(path: Path) -> bool:
    """Whether a small JSON file asks its reader to import Python files that lie beside it."""
    if not path.name.endswith(".json") or path.stat().st_size > _MAX_SETTINGS:
        return False
    data = path.read_bytes()
    return f'"{_CODE}"'.encode() in data and bool(_code_of(parse_json(data, what=escape(path.name))))


def asks_for_code(directory: Path) -> bool:
    """Whether the small files of a directory, as a step carries them over, ask for Python files beside them."""
    config = read_json_object(directory / "config.json", what=escape(directory / "config.json"), constants=True)
    beside = [path for path in directory.glob("*.json") if is_companion_name(path.name)]
    return bool(_code_of(without_code(config)[0])) or any(map(_asks_for_code, beside))


# -- what there is ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Companions:
    """What lies beside the shards: `files` come along, those that are `code` among them; `left` stays behind.
    `askers` are the files that name the code."""

    files: Mapping[str, Path]
    code: tuple[str, ...]
    askers: tuple[str, ...]
    left: tuple[str, ...]

    def read(self) -> Iterator[tuple[str, bytes]]:
        """(name, bytes) of every file that comes along, in name order. Raises InputError for one that is too large."""
        for name, path in self.files.items():
            with _reading():
                _check_size(path)
                data = path.read_bytes()
            yield name, data

    @property
    def warnings(self) -> list[str]:
        """What a user must know of the files: which code came along, and what did not come along."""
        found = []
        if self.code:
            found.append(
                f"code comes along, unread and never run: {_some(self.code)} (auto_map in {_some(self.askers)} asks "
                "for it; read it before you load it with trust_remote_code=True)"
            )
        elif self.askers:
            found.append(f"auto_map in {_some(self.askers)} asks for code that does not lie beside the weights")
        if self.left:
            found.append(f"left behind, not among the files that loaders read: {_some(self.left)}")
        return found


def find_companions(
    checkpoint: Checkpoint, config: Mapping[str, Any] | None = None, *, made: Collection[str] = ()
) -> Companions:
    """The companions of a checkpoint whose output has `config`; `made` are names of code that the step writes itself.

    Raises InputError for a link that leaves the directory, and for a file too large to be a companion; of the files
    only small JSON is read, which may name code.
    """
    beside = checkpoint.beside()
    names = [name for name, is_file in beside.items() if is_file and is_companion_name(name)]
    if beside.get(TEMPLATES) is False:
        names += filter(is_companion_name, checkpoint.inside(TEMPLATES))
    files = {name: checkpoint.confined(name) for name in names}
    with _reading():
        for path in files.values():
            _check_size(path)
        askers = [name for name, path in files.items() if _asks_for_code(path)]
    if config is not None and _code_of(config) - set(made):
        askers.append("config.json")
    code = [name for name, is_file in beside.items() if askers and is_file and name.endswith(".py")]
    code = [name for name in code if name not in made]
    files |= {name: checkpoint.confined(name) for name in code}
    left = [
        f"{name}/" if (checkpoint.path / name).is_dir() else name
        for name in beside
        if name not in files and name != TEMPLATES and not _matches(name, _OWN) and name not in made
    ]
    return Companions(dict(sorted(files.items())), tuple(code), tuple(askers), tuple(left))


@contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        name = escape(os.path.basename(error.filename or "a companion file"))
        raise InputError(f"cannot read {name}: {error.strerror}", hint="Check permissions.") from None


def _check_size(path: Path) -> None:
    if path.stat().st_size > _MAX_BYTES:
        raise InputError(f"{escape(path.name)} is too large to be a tokenizer file", hint="Remove it.")


def _some(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(escape(name) for name in names[:_SHOWN]) + more
