"""config.json from the metadata of a GGUF file: the keys that llama_cpp/numbers.py writes, read backwards."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from moeconv.checkpoint.gguf_source import GgufSource
from moeconv.errors import InputError, Unsupported, escape
from moeconv.families.registry import tables
from moeconv.families.spec import Family
from moeconv.importing.flags import flags
from moeconv.quantize.gguf.llama_cpp import LLAMA_CPP, LlamaCpp
from moeconv.quantize.gguf.llama_cpp.tensors import template
from moeconv.types import JsonObject

# llama.cpp's key without the architecture -> config key
_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
_LLAMA3 = [
    {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192}
    for factor in (8.0, 32.0)
]  # fmt: skip
FACTORS = "rope_freqs.weight"  # factors of the rotary frequencies, which config.json states in words
_ORIGINAL = "Use the original model."
_DAMAGED = "The file is damaged, or made by a program that moeconv does not know."


def candidates(source: GgufSource) -> Iterator[tuple[Family, LlamaCpp, JsonObject]]:
    """(family, row, config.json) of every family that the file may belong to, the likeliest first; the caller checks
    that the one it takes gives this file back. Raises Unsupported for an architecture without a row."""
    arch = source.metadata.get("general.architecture")
    experts = source.metadata.get(f"{arch}.expert_count", 0)
    known = tables().moe if experts else tables().dense
    found = [name for name, row in LLAMA_CPP.items() if row.arch == arch and name in known]
    if not found:
        raise Unsupported(
            f"{escape(source.path.name)}: the architecture {escape(arch)} is not imported",
            hint=f"moeconv imports {', '.join(sorted({row.arch for row in LLAMA_CPP.values()}))}.",
        )
    for name in sorted(found, key=lambda name: name.replace("_", "") != arch):
        for rope in _rotary(source, str(arch)):
            yield known[name], LLAMA_CPP[name], _config(source, str(arch), known[name], LLAMA_CPP[name], rope)


def _config(source: GgufSource, arch: str, family: Family, row: LlamaCpp, rope: JsonObject) -> JsonObject:
    defaults = family.config.defaults
    config: JsonObject = {"architectures": [family.architecture], "model_type": family.model_type}
    for key, name in _KEYS.items():
        config[name] = _one(source, f"{arch}.{key}")
    config["rms_norm_eps"] = _number(source, f"{arch}.attention.layer_norm_rms_epsilon")
    width = config["hidden_size"] // config["num_attention_heads"]
    config["head_dim"] = source.whole(f"{arch}.attention.key_length", width)
    config["vocab_size"] = _vocabulary(source)
    config["rope_parameters"] = {"rope_theta": _number(source, f"{arch}.rope.freq_base", 10000.0), **rope}
    config["tie_word_embeddings"] = "output.weight" not in source.tensors
    if family.experts.count:
        config |= dict.fromkeys(family.experts.count, source.whole(f"{arch}.expert_count"))
        config |= dict.fromkeys(family.experts.top_k, source.whole(f"{arch}.expert_used_count"))
    for key, number in row.numbers.items():
        if isinstance(number, str) and f"{arch}.{key}" in source.metadata:
            config[number] = _setting(source, f"{arch}.{key}")
    dense = f"{arch}.leading_dense_block_count"
    if "first_k_dense_replace" in defaults and dense in source.metadata:
        config["first_k_dense_replace"] = source.whole(dense, least=0)
    config |= {key: allowed[0] for key, allowed in row.needs.items() if key in defaults and key not in config}
    for key, adds in flags(family).items():
        if key not in row.needs:
            names = [(template(row, each) or "").replace("{L}", "0") for each in adds]
            config[key] = any(name in source.tensors for name in names)
    if "hidden_act" in defaults:
        config["hidden_act"] = row.activations[0]
    return config | {"dtype": "bfloat16"} | _special(source, config["vocab_size"])


def _special(source: GgufSource, size: int) -> JsonObject:
    """The ids of special tokens, which are below `size`."""
    keys = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
    found: JsonObject = {}
    for key, name in keys.items():
        stated = f"tokenizer.ggml.{key}"
        if stated not in source.metadata:
            continue
        found[name] = source.whole(stated, least=0)
        if found[name] >= size:
            raise InputError(
                f"{escape(source.path.name)}: {stated} is {found[name]}, but there are {size} tokens", hint=_DAMAGED
            )
    return found


def _vocabulary(source: GgufSource) -> int:
    embedding = source.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise InputError(
            f"{escape(source.path.name)} has no token_embd.weight", hint="The file contains no language model."
        )
    return embedding.shape[0]


def _rotary(source: GgufSource, arch: str) -> list[JsonObject]:
    """The rotary parameters that the file may have, without the base. Factors of llama3's scaling are a tensor in the
    file, so only the published parameters can be recognised."""
    if FACTORS in source.tensors:
        return [dict(each) for each in _LLAMA3]
    kind = source.metadata.get(f"{arch}.rope.scaling.type", "none")
    if kind == "none":
        return [{"rope_type": "default"}]
    found: JsonObject = {"rope_type": kind, "factor": _number(source, f"{arch}.rope.scaling.factor")}
    if kind == "yarn":
        names = {
            "original_context_length": "original_max_position_embeddings", "yarn_attn_factor": "attention_factor",
            "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow",
        }  # fmt: skip
        keys = {new: f"{arch}.rope.scaling.{old}" for old, new in names.items()}
        found |= {new: _number(source, key) for new, key in keys.items() if key in source.metadata}
    elif kind != "linear":
        raise Unsupported(f"rotary embeddings of type {escape(kind)} are not imported", hint="Use the original model.")
    return [found]


def _number(source: GgufSource, key: str, default: float | None = None) -> int | float:
    """A number above 0. Raises Unsupported where the file does not state it."""
    value = source.metadata.get(key, default)
    if value is None:
        raise Unsupported(f"{escape(source.path.name)} does not state {key}, which an import needs", hint=_ORIGINAL)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(
            f"{escape(source.path.name)}: {key} is {escape(value)}, but must be a number above 0", hint=_DAMAGED
        )
    return _short(value)


def _one(source: GgufSource, key: str) -> int:
    """A whole number above 0 that all layers share."""
    value = source.metadata.get(key)
    if value is None or isinstance(value, list):
        reason = "does not state" if value is None else "has a value for each layer of"
        raise Unsupported(f"{escape(source.path.name)} {reason} {key}: this is not imported", hint=_ORIGINAL)
    return source.whole(key)


def _setting(source: GgufSource, key: str) -> bool | int | float:
    """A finite number, or a truth value."""
    value = source.metadata[key]
    if isinstance(value, list):
        raise Unsupported(f"{key} has a value for each layer: this is not imported", hint=_ORIGINAL)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{escape(source.path.name)}: {key} is {escape(value)}, but must be a number", hint=_DAMAGED)
    return _short(value)


def _short(value: float) -> float:
    """A float as the shortest decimal that is the same float32, because that is what the file holds."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
