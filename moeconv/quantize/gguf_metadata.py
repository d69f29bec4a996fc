"""The metadata of a GGUF file: what the model is, hyperparameters and the tokenizer, encoded by the `gguf` package."""

from __future__ import annotations

import logging
import math
import struct
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Protocol

from moeconv.checkpoint.card import source_metadata
from moeconv.checkpoint.strictjson import read_json_object
from moeconv.errors import InputError, escape
from moeconv.families.model import Model
from moeconv.families.rope import read_rope
from moeconv.families.shapes import head_dim
from moeconv.quantize.gguf_tokenizer import add_tokenizer
from moeconv.quantize.llama_cpp import LlamaCpp
from moeconv.types import JsonObject

_FILE_TYPES = {"q4_0": 2, "q8_0": 7, "q4_k": 14}  # llama.cpp's llama_ftype
_SETTINGS = "generation_config.json"
# key of generation_config.json -> llama.cpp's name for the setting, and its type
_SAMPLING: dict[str, tuple[str, type]] = {
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "temperature": ("temp", float),
    "repetition_penalty": ("penalty_repeat", float),
}


Value = bool | int | float | str


class KeyWriter(Protocol):
    """What is used of `gguf.GGUFWriter` to write a key and its value."""

    def add_bool(self, key: str, val: bool) -> None: ...

    def add_uint32(self, key: str, val: int) -> None: ...

    def add_float32(self, key: str, val: float) -> None: ...

    def add_string(self, key: str, val: str) -> None: ...


def metadata(model: Model, row: LlamaCpp, *, scheme: str) -> tuple[bytes, int, list[str]]:
    """(encoded key-value pairs, their number, warnings). Raises InputError for a tokenizer that llama.cpp is not known
    to follow, and for rotary embeddings that GGUF is not written for."""
    gguf = import_gguf()
    with tempfile.TemporaryDirectory(prefix="moeconv-") as folder:
        path = Path(folder) / "head.gguf"
        writer = gguf.GGUFWriter(path, row.arch)
        for key, value in _general(gguf, model).items():
            _add(writer, f"general.{key}", value)
        for key, value in _numbers(model, row).items():
            _add(writer, f"{row.arch}.{key}", value)
        writer.add_file_type(_FILE_TYPES[scheme])
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


def _general(gguf: ModuleType, model: Model) -> dict[str, Value]:
    """What programs show of a model, and its sampling settings, by keys without `general.` in front."""
    source = model.checkpoint
    card = source_metadata(source)
    experts = [name for name, role in model.roles.items() if role.group == "expert"]
    in_experts = sum(math.prod(source.tensors[name].shape) for name in experts)
    total = sum(math.prod(source.tensors[name].shape) for name in model.roles)
    size = gguf.size_label(total, total - in_experts, in_experts // max(1, model.num_experts), model.num_experts)
    found: dict[str, Value] = {"type": "model", "name": source.name, "size_label": size}
    found |= {key: card[key] for key in ("license",) if isinstance(card.get(key), str)}
    settings: JsonObject = {}
    if (source.path / _SETTINGS).is_file():
        settings = read_json_object(source.path / _SETTINGS, what=_SETTINGS)
    for key, (word, kind) in _SAMPLING.items():
        value = settings.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[f"sampling.{word}"] = kind(value)
    return found


def _numbers(model: Model, row: LlamaCpp) -> dict[str, Value]:
    """The hyperparameters by llama.cpp's keys, without the architecture in front."""
    value, family = model.value, model.family
    heads = value("num_attention_heads")
    width = head_dim(value)
    rope = read_rope({**family.config.defaults, **model.config}, theta=10000.0, partial=family.attention.partial)
    if rope["rope_type"] not in ("default", "linear"):
        raise InputError(
            f"GGUF is not written for rotary embeddings of type {escape(rope['rope_type'])}",
            hint="Choose another --format.",
        )
    partial = rope.get("partial_rotary_factor") or 1.0
    numbers: dict[str, Value] = {
        "block_count": model.num_layers,
        "context_length": value("max_position_embeddings"),
        "embedding_length": model.hidden_size,
        "feed_forward_length": value("intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": value("num_key_value_heads") or heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": float(value("rms_norm_eps")),
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(width * partial),
        "vocab_size": value("vocab_size"),
        "expert_count": model.num_experts,
        "expert_used_count": model.top_k,
    }
    if rope["rope_type"] == "linear":
        numbers |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    for key, source in row.numbers.items():
        found = value(source)
        if found is not None:
            numbers[key] = float(found) if key == "expert_weights_scale" else found
    return numbers | dict(row.fixed)


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
        case _:
            raise TypeError(f"{key}: {type(value).__name__}")
