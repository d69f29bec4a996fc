"""The metadata of a GGUF file: what the model is, hyperparameters and the tokenizer, encoded by the `gguf` package."""

from __future__ import annotations

import logging
import math
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from moeconv.checkpoint.card import source_metadata
from moeconv.checkpoint.reader import MANIFEST_NAME, Checkpoint
from moeconv.checkpoint.strictjson import read_json_object
from moeconv.errors import InputError
from moeconv.families.model import Model
from moeconv.quantize.gguf.llama_cpp import LlamaCpp
from moeconv.quantize.gguf.llama_cpp.numbers import hyperparameters
from moeconv.quantize.gguf.llama_cpp.record import Value
from moeconv.quantize.gguf.tokenizer import add_tokenizer
from moeconv.types import JsonObject

_SETTINGS = "generation_config.json"
_FROM_CARD = ("license", "license_name", "license_link", "language", "base_model", "datasets", "tags", "pipeline_tag")
# key of generation_config.json -> llama.cpp's name for the setting, and its type
_SAMPLING: dict[str, tuple[str, type]] = {
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "temperature": ("temp", float),
    "repetition_penalty": ("penalty_repeat", float),
}


class KeyWriter(Protocol):
    """What is used of `gguf.GGUFWriter` to write a key and its value."""

    def add_bool(self, key: str, val: bool) -> None: ...

    def add_uint32(self, key: str, val: int) -> None: ...

    def add_float32(self, key: str, val: float) -> None: ...

    def add_string(self, key: str, val: str) -> None: ...

    def add_array(self, key: str, val: Sequence[Any]) -> None: ...


def metadata(model: Model, row: LlamaCpp, *, file_type: int) -> tuple[bytes, int, list[str]]:
    """(encoded key-value pairs, their number, warnings). `file_type` is llama.cpp's number for what most tensors are.
    Raises InputError for a tokenizer that llama.cpp is not known to follow, and for rotary embeddings that GGUF is not
    written for."""
    gguf = import_gguf()
    with tempfile.TemporaryDirectory(prefix="moeconv-") as folder:
        path = Path(folder) / "head.gguf"
        writer = gguf.GGUFWriter(path, row.arch)
        _add_general(gguf, writer, model)
        for key, value in _sampling(model).items():
            _add(writer, f"general.sampling.{key}", value)
        for key, value in hyperparameters(model, row).items():
            _add(writer, f"{row.arch}.{key}", value)
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        notes = add_tokenizer(gguf, writer, model.checkpoint.path, size=int(model.value("vocab_size")))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        data = path.read_bytes()
    (count,) = struct.unpack_from("<Q", data, 16)
    return data[24:], count, notes


def import_gguf() -> ModuleType:
    """The optional `gguf` package. Raises InputError, with the command that installs it, where it is missing."""
    try:
        import gguf
    except ImportError:
        raise InputError("--format gguf needs the gguf package", hint="Install it: pip install gguf") from None
    logging.getLogger("gguf").setLevel(logging.ERROR)
    return gguf


def _add_general(gguf: ModuleType, writer: Any, model: Model) -> None:
    """Write what programs show of a model, by the rules of llama.cpp's converter: name, basename, version and size from
    the name of the directory; licence, base models, data sets, tags and languages from the model card."""
    source = model.checkpoint
    experts = [name for name, role in model.roles.items() if role.group == "expert"]
    in_experts = sum(math.prod(source.tensors[name].shape) for name in experts)
    total = sum(math.prod(source.tensors[name].shape) for name in model.roles)
    size = gguf.size_label(total, total - in_experts, in_experts // max(1, model.num_experts), model.num_experts)
    card = source_metadata(source, _FROM_CARD if _is_original(source) else ("license",))
    shown = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), card, {}, Path(source.name), total)
    shown.name, shown.size_label = shown.name or source.name, shown.size_label or size
    writer.add_string("general.type", "model")
    shown.set_gguf_meta_model(writer)


def _is_original(source: Checkpoint) -> bool:
    """Whether the model card is that of the weights: neither written by moeconv, nor that of the source of an earlier
    step. A dry run of several steps then states the size of the file to the byte."""
    there = all((source.path / shard).is_file() for shard in source.shards)
    return there and not (source.path / MANIFEST_NAME).is_file()


def _sampling(model: Model) -> dict[str, Value]:
    """The sampling settings of generation_config.json, by keys without `general.sampling.` in front."""
    path = model.checkpoint.path / _SETTINGS
    settings: JsonObject = read_json_object(path, what=_SETTINGS) if path.is_file() else {}
    found: dict[str, Value] = {}
    for key, (word, kind) in _SAMPLING.items():
        value = settings.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[word] = kind(value)
    return found


def _add(writer: KeyWriter, key: str, value: Value) -> None:
    """Write a value under the GGUF type of its Python type."""
    match value:
        case bool():  # before int, of which it is a subclass
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)
        case _:
            raise TypeError(f"{key}: {type(value).__name__}")
