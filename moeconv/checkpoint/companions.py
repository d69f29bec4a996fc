"""Which files beside the shards are copied to an output: tokenizer, processors, templates, generation config, licence.

The loader of tokenizers and the copier use the same list. Code is copied unread, and only if a copied file names it;
everything else in the directory is left behind, and a warning names it.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moeconv.checkpoint.reader import INDEX_NAME, MANIFEST_NAME, SETTINGS_NAME, Checkpoint
from moeconv.checkpoint.strictjson import parse_json, read_json_object
from moeconv.errors import InputError, escape
from moeconv.types import Config, JsonObject

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
# files that a step writes itself, and files that the reader has warned about already
_OWN = ("config.json", INDEX_NAME, MANIFEST_NAME, SETTINGS_NAME, "README.md", "*.safetensors", ".*")
_MAX_BYTES = 256 * 1024 * 1024
_MAX_SETTINGS = 1 << 20  # bytes of a JSON file that may name code
_SHOWN = 8
_CODE = "auto_map"
_MODEL_CLASSES = ("AutoConfig", "AutoModel", "TFAutoModel", "FlaxAutoModel")  # the beginnings of their keys
ENTRY = "modeling_moeconv"  # the module that loads packed weights written with --self-contained


def is_licence(name: str) -> bool:
    """Whether a companion is a licence, a notice or a use policy."""
    return _matches(name, _LICENCES)


def has_vocabulary(directory: Path) -> bool:
    """Whether a directory holds a file from which a tokenizer can be made."""
    return any(path.is_file() for pattern in VOCABULARIES for path in directory.glob(pattern))


def is_companion_name(name: str) -> bool:
    """Whether a file is copied for its name alone. `name` may be in the directory of templates: FOLDER/NAME."""
    folder, _, file = name.rpartition("/")
    if folder:
        return folder == TEMPLATES and file.endswith(".jinja") and not file.startswith(".")
    return _matches(name, PATTERNS) and not _matches(name, _NEVER)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


# -- code ------------------------------------------------------------------------------------------------------------


def without_code(config: Config) -> tuple[JsonObject, list[str]]:
    """config.json without the entries of `auto_map` that name code for the config and the model, and those entries.

    transformers has a class of its own for every supported family, so this code is not needed. The one exception is
    the loader of packed weights that moeconv itself wrote beside them.
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


def _modules(value: object) -> list[str]:
    """The Python modules in the checkpoint's own directory that an entry of `auto_map` names."""
    entries = value if isinstance(value, list) else [value]
    return [e.partition(".")[0] for e in entries if isinstance(e, str) and "." in e and "--" not in e and "/" not in e]


def _code_of(value: object) -> set[str]:
    """The Python files that a JSON object asks its reader to import."""
    named = value.get(_CODE) if isinstance(value, Mapping) else None
    return {f"{m}.py" for entry in named.values() for m in _modules(entry)} if isinstance(named, dict) else set()


def _asks_for_code(path: Path) -> bool:
    """Whether a JSON file of at most 1 MiB asks its reader to import Python files from its directory."""
    if not path.name.endswith(".json") or path.stat().st_size > _MAX_SETTINGS:
        return False
    data = path.read_bytes()
    return f'"{_CODE}"'.encode() in data and bool(_code_of(parse_json(data, what=escape(path.name))))


def asks_for_code(directory: Path) -> bool:
    """Whether the files that a step would copy from a directory ask for Python files in it."""
    config = read_json_object(directory / "config.json", what=escape(directory / "config.json"), constants=True)
    beside = [path for path in directory.glob("*.json") if is_companion_name(path.name)]
    return bool(_code_of(without_code(config)[0])) or any(map(_asks_for_code, beside))


# -- companions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Companions:
    """The files beside the shards: `files` are copied, `code` among them; `left` are left behind. `askers` are the
    files that name the code."""

    files: Mapping[str, Path]
    code: tuple[str, ...]
    askers: tuple[str, ...]
    left: tuple[str, ...]

    def read(self) -> Iterator[tuple[str, bytes]]:
        """(name, bytes) of every copied file, in name order. Raises InputError for one that is too large."""
        for name, path in self.files.items():
            with _reading():
                _check_size(path)
                data = path.read_bytes()
            yield name, data

    @property
    def warnings(self) -> list[str]:
        """What a user must know about the files: which code is copied, and which files are left behind."""
        found = []
        if self.code:
            found.append(
                f"code is copied, unread and never run: {_some(self.code)} (auto_map in {_some(self.askers)} asks for "
                "it; read it before you load it with trust_remote_code=True)"
            )
        elif self.askers:
            found.append(f"auto_map in {_some(self.askers)} asks for code that is not in the directory")
        if self.left:
            found.append(f"not copied, because no loader reads them: {_some(self.left)}")
        return found


def find_companions(checkpoint: Checkpoint, config: Config | None = None, *, made: Collection[str] = ()) -> Companions:
    """The companions of a checkpoint whose output has `config`; `made` are names of code that the step writes itself.

    Only small JSON files are read, because they may name code. Raises InputError for a link that leaves the directory,
    and for a file that is too large to be a companion.
    """
    beside = checkpoint.beside()
    files = _copied_by_name(checkpoint, beside)
    with _reading():
        for path in files.values():
            _check_size(path)
        askers = [name for name, path in files.items() if _asks_for_code(path)]
    if config is not None and _code_of(config) - set(made):
        askers.append("config.json")
    modules = [name for name, is_file in beside.items() if is_file and name.endswith(".py") and name not in made]
    code = modules if askers else []
    files |= {name: checkpoint.confined(name) for name in code}
    left = _left_behind(checkpoint, beside, copied={*files, *made, TEMPLATES})
    return Companions(dict(sorted(files.items())), tuple(code), tuple(askers), tuple(left))


def _copied_by_name(checkpoint: Checkpoint, beside: Mapping[str, bool]) -> dict[str, Path]:
    """{name: path} of the companions that need nothing but their name; `beside` maps a name to whether it is a file."""
    names = [name for name, is_file in beside.items() if is_file and is_companion_name(name)]
    if beside.get(TEMPLATES) is False:
        names += filter(is_companion_name, checkpoint.inside(TEMPLATES))
    return {name: checkpoint.confined(name) for name in names}


def _left_behind(checkpoint: Checkpoint, beside: Collection[str], *, copied: Collection[str]) -> list[str]:
    """Names of everything else in the directory, those of directories with a slash at the end."""
    names = [name for name in beside if name not in copied and not _matches(name, _OWN)]
    return [f"{name}/" if (checkpoint.path / name).is_dir() else name for name in names]


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
