"""What transformers computes with a config.json: two differently worded configs of one model have the same meaning.

Defaults are filled in; rotary parameters, sliding windows and kinds of layers are listed in full; settings without
effect are left out. So families whose configs differ only in their keys (llama, mistral) can be compared too.
"""

from __future__ import annotations

from moeconv.families import rope, sliding
from moeconv.families.model import Model
from moeconv.families.shapes import head_dim
from moeconv.families.target import CARRIED, LEFT_OUT, TRAINING
from moeconv.types import JsonObject

# keys about the number of positions or tokens, or about the end of a text: no weight of a layer depends on them
OUTSIDE_THE_LAYERS = ("max_position_embeddings", "tie_word_embeddings", "vocab_size", "eod_token_id", "tie_embedding")
# rotary parameters of these types do not depend on the longest context
_LENGTH_FREE = ("default", "linear", "llama3")


def meaning(model: Model) -> JsonObject:
    """The settings that determine what a model's layers compute; two models with equal values compute alike.

    Settings that families name differently have names of moeconv's own.
    """
    family = model.family
    spelled = {*rope.KEYS, *sliding.KEYS, "sliding_window_pattern", "head_dim", "num_key_value_heads"}
    found = {
        key: model.value(key)
        for key in family.config.defaults
        if key not in spelled | CARRIED | LEFT_OUT | TRAINING and key not in OUTSIDE_THE_LAYERS
    }
    found = {
        key: value for key, value in found.items()
        if not any(value == n and type(value) is type(n) for n in family.config.neutral.get(key, ()))
    }  # fmt: skip
    window = model.sliding
    slides = window.window is not None and window.window < model.value("max_position_embeddings")
    found |= {
        "head_dim": head_dim(model.value),
        "num_key_value_heads": model.value("num_key_value_heads") or model.value("num_attention_heads"),
        "num_hidden_layers": model.num_layers,
        "sliding_window": window.window if slides else None,
        "sliding layers": window.layers if slides else (),
        "kinds of layers": model.layer_kinds,
        "order of rotary dimensions": family.attention.rotary,
        "offset of norms": family.tensors.norm_offset,
    }
    return found | _rope(model)


def _rope(model: Model) -> JsonObject:
    """The rotary parameters, and the longest context if they depend on it."""
    family = model.family
    if family.attention.rope == "none":
        return {}
    stated = {key: value for key in rope.KEYS if (value := model.value(key)) is not None}
    params = rope.read_rope(stated, theta=family.config.defaults["rope_theta"], partial=family.attention.partial)
    if params.get("partial_rotary_factor") == 1.0:
        del params["partial_rotary_factor"]
    found: JsonObject = {"rope_parameters": params}
    if params["rope_type"] not in _LENGTH_FREE:
        found["max_position_embeddings"] = model.value("max_position_embeddings")
    if family.attention.rope in ("per_type", "per_layer", "own", "no_rope"):
        found |= {key: stated.get(key) for key in ("layer_rope_theta",) if family.attention.rope == "per_layer"}
        if family.attention.rope == "no_rope":
            found["rotating layers"] = rope.rotating(model.value, model.num_layers)
        elif isinstance(nested := stated.get("rope_parameters"), dict):
            found["rope_parameters of sliding layers"] = nested.get("sliding_attention")
    return found
