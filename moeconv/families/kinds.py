"""Is each value of a config.json of the kind that its key takes? Asked once, before anything computes with it.

The kind of a key is the kind of its default. Null stays what it is: a family's own word for none, or for derived.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeconv.errors import InputError, escape
from moeconv.families.spec import Family

_WHOLE, _NUMBER, _SWITCH, _WORD, _LIST, _OBJECT = (
    "a whole number", "a number", "true or false", "a word", "a list", "an object",
)  # fmt: skip
# keys whose default is null, because the class derives it or a checkpoint must say it
_DERIVED = {
    "vocab_size": _WHOLE, "hidden_size": _WHOLE, "intermediate_size": _WHOLE, "num_hidden_layers": _WHOLE,
    "num_attention_heads": _WHOLE, "head_dim": _WHOLE, "max_window_layers": _WHOLE, "sliding_window": _WHOLE,
    "sliding_window_pattern": _WHOLE, "full_attention_interval": _WHOLE, "block_ff_dim": _WHOLE,
    "n_shared_experts": _WHOLE, "num_nextn_predict_layers": _WHOLE, "prefix_dense_intermediate_size": _WHOLE,
    "partial_rotary_factor": _NUMBER, "rotary_scaling_factor": _NUMBER, "clip_qkv": _NUMBER, "rms_norm_eps": _NUMBER,
    "layer_types": _LIST, "mlp_layer_types": _LIST, "no_rope_layers": _LIST, "full_attn_idxs": _LIST,
    "rope_parameters": _OBJECT, "rope_scaling": _OBJECT, "hidden_activation": _WORD, "position_embedding_type": _WORD,
}  # fmt: skip
# what every size is computed from: neither null nor zero
_NEEDED = ("vocab_size", "hidden_size", "num_attention_heads")


def check_kinds(family: Family, config: Mapping[str, Any]) -> None:
    """Raises InputError for a value of another kind than its key takes, and for a missing or negative size."""
    for key, default in family.config.items():
        value, kind = config.get(key), _kind_of(key, default)
        if value is None and not (key in _NEEDED and (key in config or default is None)):
            continue
        if (kind and not _is(kind, value)) or (key in _NEEDED and value == 0):
            raise InputError(
                f"config.json: {key} must be {kind}, found {escape(value)[:200]}",
                hint="Correct config.json, or download it again.",
            )


def _kind_of(key: str, default: Any) -> str | None:
    if isinstance(default, bool):
        return _SWITCH
    if isinstance(default, int):
        return _WHOLE
    if isinstance(default, float):
        return _NUMBER
    if isinstance(default, list):
        return _LIST
    if isinstance(default, str):
        return _WHOLE if default.startswith("=") else _WORD
    return _DERIVED.get(key)


def _is(kind: str, value: Any) -> bool:
    if kind == _WHOLE:
        return type(value) is int and value >= 0
    if kind == _NUMBER:
        return type(value) in (int, float)
    return isinstance(value, {_SWITCH: bool, _WORD: str, _LIST: list, _OBJECT: dict}[kind])
