"""Is each value of a config.json of the kind that its key takes? Asked once, before anything computes with it.

The kind of a key is the kind of its default. Null stays what it is: a family's own word for none, or for derived.
"""

from __future__ import annotations

import math
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
    "mtp_layers_block_type": _LIST, "hybrid_override_pattern": _WORD, "moe_latent_size": _WHOLE,
    "attn_layer_indices": _LIST, "global_head_dim": _WHOLE, "num_global_key_value_heads": _WHOLE,
    "final_logit_softcapping": _NUMBER, "use_bidirectional_attention": _WORD, "per_layer_config": _OBJECT,
    "attention_multiplier": _NUMBER, "initializer_range": _NUMBER, "v_head_dim": _WHOLE,
    "rope_parameters": _OBJECT, "rope_scaling": _OBJECT, "hidden_activation": _WORD, "position_embedding_type": _WORD,
}  # fmt: skip
_NEEDED = ("vocab_size", "hidden_size", "num_attention_heads")  # a checkpoint must say them
# what other numbers are computed from: when it is said, it is neither null nor zero
_COMPUTED = (
    *_NEEDED, "intermediate_size", "max_position_embeddings", "block_multiple_of", "kv_lora_rank", "qk_nope_head_dim",
    "qk_rope_head_dim", "v_head_dim", "embedding_multiplier", "residual_multiplier", "attention_multiplier",
    "logits_scaling", "logit_scale", "scale_emb", "scale_depth", "dim_model_base",
)  # fmt: skip
_LARGEST = 1 << 40
_LARGEST_OF_A_HEAD = 1 << 16  # rows of a head are spelled out one by one
_ROPE = ("rope_parameters", "rope_scaling")
_ROPE_NUMBERS = (
    "rope_theta",
    "factor",
    "partial_rotary_factor",
    "attention_factor",
    "original_max_position_embeddings",
)
_ROPE_LISTS = ("short_factor", "long_factor")


def check_kinds(family: Family, config: Mapping[str, Any]) -> None:
    """Raises InputError for a value of another kind than its key takes, and for a missing or impossible size."""
    for key, default in family.config.defaults.items():
        value, kind = config.get(key), _kind_of(key, default)
        missing = key not in config and not (key in _NEEDED and default is None)
        if kind is None or missing or (value is None and (key not in _COMPUTED or key in family.config.derived)):
            continue
        least = 1 if key in _COMPUTED else 0
        most = _LARGEST_OF_A_HEAD if key.endswith(("head_dim", "_heads")) else _LARGEST
        if not _is(kind, value) or (least and value == 0) or (isinstance(value, int) and value > most):
            raise _wrong(key, f"{kind} from {least} to {most}" if kind == _WHOLE else kind, value)
    for key in _ROPE:
        found = config.get(key)
        for params in (found, *found.values()) if isinstance(found, dict) else ():
            _check_rope(key, params)


def counts_something(family: Family, key: str) -> bool:
    """Whether the key's value is a whole number: a size, or a count of experts."""
    return (
        key in (*family.experts.count, *family.experts.top_k)
        or _kind_of(key, family.config.defaults.get(key)) == _WHOLE
    )


def _check_rope(key: str, params: Any) -> None:
    """Rotary parameters, or those of one kind of layers; what has no business in them is the class's affair."""
    if not isinstance(params, dict):
        return
    for name, value in params.items():
        if name in _ROPE_NUMBERS and value is not None and (not _is(_NUMBER, value) or value <= 0):
            raise _wrong(f"{key}.{name}", "a number above 0", value)
        if name in _ROPE_LISTS and not (isinstance(value, list) and all(_is(_NUMBER, v) for v in value)):
            raise _wrong(f"{key}.{name}", "a list of numbers", value)
        if name in ("rope_type", "type") and not isinstance(value, str | None):
            raise _wrong(f"{key}.{name}", "a word", value)


def _wrong(key: str, wanted: str, value: Any) -> InputError:
    return InputError(
        f"config.json: {key} must be {wanted}, found {escape(value)[:200]}",
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
    if isinstance(default, dict):
        return _OBJECT
    if isinstance(default, str):
        return _WHOLE if default.startswith("=") else _WORD
    return _DERIVED.get(key)


def _is(kind: str, value: Any) -> bool:
    if kind == _WHOLE:
        return type(value) is int and value >= 0
    if kind == _NUMBER:
        return type(value) in (int, float) and math.isfinite(value)
    return isinstance(value, {_SWITCH: bool, _WORD: str, _LIST: list, _OBJECT: dict}[kind])
