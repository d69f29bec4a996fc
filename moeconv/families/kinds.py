"""Checks the type and range of every value in a config.json, once, before anything computes with it.

A value must have the kind (whole number, list, ...) of its key's default. Null is accepted, since it means "none" or
that the class derives the value, except for the keys in `_COMPUTED` that have no rule in the row's `derived`.
"""

from __future__ import annotations

import math

from moeconv.errors import InputError, escape
from moeconv.families.records import LIST, NUMBER, OBJECT, SWITCH, WHOLE, WORD
from moeconv.families.spec import Family
from moeconv.types import Config

# Kinds of the keys that several families share and whose default is null, because the class derives the value or every
# checkpoint must state it. The row of a family has the kinds of keys that only it has.
_DERIVED = {
    "vocab_size": WHOLE, "hidden_size": WHOLE, "intermediate_size": WHOLE, "num_hidden_layers": WHOLE,
    "num_attention_heads": WHOLE, "head_dim": WHOLE, "v_head_dim": WHOLE, "max_window_layers": WHOLE,
    "sliding_window": WHOLE, "sliding_window_pattern": WHOLE, "full_attention_interval": WHOLE,
    "n_shared_experts": WHOLE, "num_nextn_predict_layers": WHOLE, "partial_rotary_factor": NUMBER, "clip_qkv": NUMBER,
    "rms_norm_eps": NUMBER, "initializer_range": NUMBER, "layer_types": LIST, "mlp_layer_types": LIST,
    "no_rope_layers": LIST, "use_bidirectional_attention": WORD, "rope_parameters": OBJECT, "rope_scaling": OBJECT,
}  # fmt: skip
_NEEDED = ("vocab_size", "hidden_size", "num_attention_heads")  # a checkpoint must state them
# other numbers are computed from these, so a stated value must be neither null nor zero
_COMPUTED = (
    *_NEEDED, "intermediate_size", "max_position_embeddings", "block_multiple_of", "kv_lora_rank", "qk_nope_head_dim",
    "qk_rope_head_dim", "v_head_dim", "embedding_multiplier", "residual_multiplier", "attention_multiplier",
    "logits_scaling", "logit_scale", "scale_emb", "scale_depth", "dim_model_base",
)  # fmt: skip
_LARGEST = 1 << 40
_LARGEST_OF_A_HEAD = 1 << 16  # smaller, because some code makes a list of all rows of a head
_ROPE = ("rope_parameters", "rope_scaling")
_ROPE_NUMBERS = (
    "rope_theta",
    "factor",
    "partial_rotary_factor",
    "attention_factor",
    "original_max_position_embeddings",
)
_ROPE_LISTS = ("short_factor", "long_factor")


def check_kinds(family: Family, config: Config) -> None:
    """Raises InputError for a value of the wrong kind, and for a size that is missing or impossible."""
    for key, default in family.config.defaults.items():
        value, kind = config.get(key), kind_of(family, key)
        missing = key not in config and not (key in _NEEDED and default is None)
        if kind is None or missing or (value is None and (key not in _COMPUTED or key in family.config.derived)):
            continue
        least = 1 if key in _COMPUTED else 0
        most = _LARGEST_OF_A_HEAD if key.endswith(("head_dim", "_heads")) else _LARGEST
        if not _is(kind, value) or (least and value == 0) or (isinstance(value, int) and value > most):
            raise _wrong(key, f"{kind} from {least} to {most}" if kind == WHOLE else kind, value)
    for key in _ROPE:
        found = config.get(key)
        for params in (found, *found.values()) if isinstance(found, dict) else ():
            _check_rope(key, params)


def counts_something(family: Family, key: str) -> bool:
    """Whether the key's value is a whole number: a size, or a count of experts."""
    return key in (*family.experts.count, *family.experts.top_k) or kind_of(family, key) == WHOLE


def _check_rope(key: str, params: object) -> None:
    """Check the rotary parameters of all layers, or of one type of layer. Unknown keys are left to the class."""
    if not isinstance(params, dict):
        return
    for name, value in params.items():
        if name in _ROPE_NUMBERS and value is not None and (not _is(NUMBER, value) or value <= 0):
            raise _wrong(f"{key}.{name}", "a number above 0", value)
        if name in _ROPE_LISTS and not (isinstance(value, list) and all(_is(NUMBER, v) for v in value)):
            raise _wrong(f"{key}.{name}", "a list of numbers", value)
        if name in ("rope_type", "type") and not isinstance(value, str | None):
            raise _wrong(f"{key}.{name}", "a word", value)


def _wrong(key: str, wanted: str, value: object) -> InputError:
    return InputError(
        f"config.json: {key} must be {wanted}, found {escape(value)[:200]}",
        hint="Correct config.json, or download it again.",
    )


def kind_of(family: Family, key: str) -> str | None:
    """The kind of a config key's values (WHOLE, ...), worded for an error message; None if no row states it."""
    default = family.config.defaults.get(key)
    if isinstance(default, bool):
        return SWITCH
    if isinstance(default, int):
        return WHOLE
    if isinstance(default, float):
        return NUMBER
    if isinstance(default, list):
        return LIST
    if isinstance(default, dict):
        return OBJECT
    if isinstance(default, str):
        return WHOLE if default.startswith("=") else WORD
    return family.config.kinds.get(key, _DERIVED.get(key))


def _is(kind: str, value: object) -> bool:
    if kind == WHOLE:
        return type(value) is int and value >= 0
    if kind == NUMBER:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, {SWITCH: bool, WORD: str, LIST: list, OBJECT: dict}[kind])
