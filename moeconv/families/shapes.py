"""Shapes of tensors from config.json: an expression for every key, over sizes that are computed from config keys.

A planner asks before any file exists; opening a checkpoint compares every header with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moeconv.families.placement import Get


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies: its layer, and whether that attends through a window."""

    layer: int | None = None
    slides: bool = False


Size = Callable[[Get, Place], Any]

# key -> its dimensions: sums of products of the sizes below
_SHAPES: Mapping[str, str] = {
    "embedding.tokens": "vocab, hidden",
    "embedding.lm_head": "vocab, hidden",
    "embedding.lm_head_bias": "vocab",
    "attention.q": "heads*head, hidden",
    "attention.k": "kv*head, hidden",
    "attention.v": "kv*v_head, hidden",
    "attention.o": "hidden, heads*v_head",
    "attention.q_bias": "heads*head",
    "attention.k_bias": "kv*head",
    "attention.v_bias": "kv*v_head",
    "attention.o_bias": "hidden",
    "attention.q_norm": "head",
    "attention.k_norm": "head",
    "attention.q_norm_after_rope": "head",
    "attention.k_norm_after_rope": "head",
    "attention.gate": "heads*head, hidden",
    "attention.sinks": "heads",
    "attention.q_whole": "heads*nope + heads*rope, hidden",
    "attention.q_a": "q_rank, hidden",
    "attention.q_a_norm": "q_rank",
    "attention.q_b": "heads*nope + heads*rope, q_rank",
    "attention.kv_a": "kv_rank + rope, hidden",
    "attention.kv_a_norm": "kv_rank",
    "attention.kv_b": "heads*nope + heads*v_latent, kv_rank",
    "norm.attention": "hidden",
    "norm.ffn": "hidden",
    "norm.final": "hidden",
    "norm.post_attention": "hidden",
    "norm.post_ffn": "hidden",
    "norm.post1": "hidden",
    "norm.post2": "hidden",
    "norm.shared": "hidden",
    "norm.post_shared": "hidden",
    "norm.post_experts": "hidden",
    "norm.router": "hidden",
    "norm.layer": "1",
    "norm.attention_bias": "hidden",
    "norm.ffn_bias": "hidden",
    "norm.final_bias": "hidden",
    "router.weight": "experts, hidden",
    "router.bias": "experts",
    "router.correction": "experts",
    "router.scale": "experts",
    "router.correction_row": "1, experts",
    "expert.gate": "expert, hidden",
    "expert.up": "expert, hidden",
    "expert.down": "hidden, expert",
    "expert.gate_bias": "expert",
    "expert.up_bias": "expert",
    "expert.down_bias": "hidden",
    "shared.router": "1, hidden",
    "shared.gate": "shared, hidden",
    "shared.up": "shared, hidden",
    "shared.down": "hidden, shared",
    "ffn.gate": "width, hidden",
    "ffn.up": "width, hidden",
    "ffn.down": "hidden, width",
    "ffn.gate_bias": "width",
    "ffn.up_bias": "width",
    "ffn.down_bias": "hidden",
    "conv.kernel": "hidden, 1, conv_kernel",
    "conv.kernel_bias": "hidden",
    "conv.in": "3*hidden, hidden",
    "conv.in_bias": "3*hidden",
    "conv.out": "hidden, hidden",
    "conv.out_bias": "hidden",
    "linear.A": "linear_v_heads",
    "linear.dt": "linear_v_heads",
    "linear.conv": "2*linear_key + linear_value, 1, linear_kernel",
    "linear.a": "linear_v_heads, hidden",
    "linear.b": "linear_v_heads, hidden",
    "linear.ba": "2*linear_v_heads, hidden",
    "linear.qkv": "2*linear_key + linear_value, hidden",
    "linear.z": "linear_value, hidden",
    "linear.qkvz": "2*linear_key + 2*linear_value, hidden",
    "linear.norm": "linear_v_head",
    "linear.out": "hidden, linear_value",
    "mamba.A": "mamba_heads",
    "mamba.D": "mamba_heads",
    "mamba.dt": "mamba_heads",
    "mamba.conv": "mamba_inner + 2*mamba_groups*mamba_state, 1, mamba_kernel",
    "mamba.conv_bias": "mamba_inner + 2*mamba_groups*mamba_state",
    "mamba.in": "2*mamba_inner + 2*mamba_groups*mamba_state + mamba_heads, hidden",
    "mamba.in_bias": "2*mamba_inner + 2*mamba_groups*mamba_state + mamba_heads",
    "mamba.norm": "mamba_inner",
    "mamba.out": "hidden, mamba_inner",
    "mamba.out_bias": "hidden",
    "mtp.embedding": "vocab, hidden",
    "mtp.head": "vocab, hidden",
    "mtp.norm": "hidden",
    "mtp.norm_ffn": "hidden",
    "mtp.norm_embedding": "hidden",
    "mtp.norm_hidden": "hidden",
    "mtp.project": "hidden, 2*hidden",
}
# what a family's row says for itself, in the words of the table above
WHOLE_ROW_NORMS = {"attention.q_norm": "heads*head", "attention.k_norm": "kv*head"}
GATED_QUERY = {"attention.q": "2*heads*head, hidden", "attention.q_bias": "2*heads*head"}
NORM_OF_EACH_HEAD = {"attention.q_norm": "heads, head", "attention.k_norm": "kv, head"}
LATENT = {"attention.o": "hidden, heads*v_latent"}
MAMBA_1 = {
    "mamba.A": "mamba_inner, mamba_state",
    "mamba.D": "mamba_inner",
    "mamba.conv": "mamba_inner, 1, mamba_kernel",
    "mamba.conv_bias": "mamba_inner",
    "mamba.in": "2*mamba_inner, hidden",
    "mamba.in_bias": "2*mamba_inner",
    "mamba.x": "mamba_rank + 2*mamba_state, mamba_inner",
    "mamba.dt": "mamba_inner, mamba_rank",
    "mamba.dt_bias": "mamba_inner",
    "mamba.dt_norm": "mamba_rank",
    "mamba.b_norm": "mamba_state",
    "mamba.c_norm": "mamba_state",
}


def head_dim(get: Get) -> int:
    """Rows of an attention head: what config says, else hidden_size / heads."""
    return get("head_dim") or get("hidden_size") // get("num_attention_heads")


def _key(key: str) -> Size:
    return lambda get, place: get(key)


# name -> its number; a row's `sizes` come before these
_SIZES: Mapping[str, Size] = {
    "hidden": _key("hidden_size"),
    "vocab": _key("vocab_size"),
    "heads": _key("num_attention_heads"),
    "kv": lambda get, place: get("num_key_value_heads") or get("num_attention_heads"),
    "head": lambda get, place: head_dim(get),
    "v_head": lambda get, place: head_dim(get),
    "q_rank": _key("q_lora_rank"),
    "kv_rank": _key("kv_lora_rank"),
    "nope": _key("qk_nope_head_dim"),
    "rope": _key("qk_rope_head_dim"),
    "v_latent": _key("v_head_dim"),
    "conv_kernel": _key("conv_L_cache"),
    "linear_v_heads": _key("linear_num_value_heads"),
    "linear_v_head": _key("linear_value_head_dim"),
    "linear_key": lambda get, place: get("linear_num_key_heads") * get("linear_key_head_dim"),
    "linear_value": lambda get, place: get("linear_num_value_heads") * get("linear_value_head_dim"),
    "linear_kernel": _key("linear_conv_kernel_dim"),
    "mamba_heads": _key("mamba_n_heads"),
    "mamba_inner": lambda get, place: int(get("mamba_expand") * get("hidden_size")),
    "mamba_groups": _key("mamba_n_groups"),
    "mamba_state": _key("mamba_d_state"),
    "mamba_kernel": _key("mamba_d_conv"),
    "mamba_rank": lambda get, place: _mamba_rank(get("mamba_dt_rank"), get("hidden_size")),
}
NEMOTRON_H_SIZES: Mapping[str, Size] = {
    "mamba_heads": _key("mamba_num_heads"),
    "mamba_inner": lambda get, place: get("mamba_num_heads") * get("mamba_head_dim"),
    "mamba_groups": _key("n_groups"),
    "mamba_state": _key("ssm_state_size"),
    "mamba_kernel": _key("conv_kernel"),
}


def _in_layer(get: Get, place: Place, key: str) -> Any:
    """What config.json says of one layer alone, else None."""
    each = get("per_layer_config")
    of_layer = each.get(str(place.layer)) if isinstance(each, dict) else None
    return of_layer.get(key) if isinstance(of_layer, dict) else None


def _global_heads(get: Get, place: Place) -> Any:
    """Gemma 4's layers without a window have heads of another size, which either key says."""
    said = place.slides or get("per_layer_config") is not None
    return _in_layer(get, place, "head_dim") or (get("head_dim") if said else get("global_head_dim"))


def _global_kv(get: Get, place: Place) -> Any:
    said = get("per_layer_config") is not None or place.slides or not get("attention_k_eq_v")
    apart = None if said else get("num_global_key_value_heads")
    return _in_layer(get, place, "num_key_value_heads") or apart or get("num_key_value_heads")


def _mimo_kv(get: Get, place: Place) -> Any:
    """Twice as many where the layer slides."""
    kinds = get("layer_types")
    if not isinstance(kinds, list) or place.layer is None or place.layer >= len(kinds):
        return None
    return get("num_key_value_heads") * (2 if kinds[place.layer] == "sliding_attention" else 1)


def _heads_of_layer(get: Get, place: Place) -> Any:
    each = get("num_attention_heads_per_layer")
    if not isinstance(each, list):
        return get("num_attention_heads")
    return each[place.layer] if place.layer is not None and place.layer < len(each) else None


GEMMA4_SIZES: Mapping[str, Size] = {"head": _global_heads, "v_head": _global_heads, "kv": _global_kv}
MIMO_SIZES: Mapping[str, Size] = {"kv": _mimo_kv, "v_head": _key("v_head_dim")}
LAGUNA_SIZES: Mapping[str, Size] = {
    "heads": _heads_of_layer,
    # a gate for each head, or for each of its numbers
    "gates": lambda get, place: (
        _heads_of_layer(get, place)
        if get("gating") in (None, True, "per-head")
        else _heads_of_layer(get, place) * head_dim(get)
    ),
}


def _mamba_rank(rank: Any, hidden: int) -> Any:
    return -(-hidden // 16) if rank in ("auto", None) else rank


def shape_of(
    key: str,
    get: Get,
    *,
    counts: Mapping[str, Callable[[], int]],
    place: Place = Place(),
    shapes: Mapping[str, str] | None = None,
    sizes: Mapping[str, Size] | None = None,
) -> tuple[int, ...]:
    """The shape of the matrix `key` in a model of this config.

    `counts` are the sizes that a caller knows (experts, width, expert, shared), asked where they are used; `shapes` and
    `sizes` are those of the family's row. Raises KeyError where no rule is known or config.json does not say.
    """
    own = {**_SIZES, **(sizes or {})}

    def number(name: str) -> int:
        if name.isdigit():
            return int(name)
        value = counts[name]() if name in counts else own[name](get, place)
        if type(value) is not int:
            raise KeyError(name)
        return value

    expression = {**_SHAPES, **(shapes or {})}[key]
    if not expression:
        raise KeyError(key)
    return tuple(
        sum(math.prod(number(name.strip()) for name in term.split("*")) for term in dimension.split("+"))
        for dimension in expression.split(",")
    )


def shared_width(keys: tuple[str, ...], get: Get) -> int:
    """Neurons of the shared expert: the product of the config keys that say it."""
    return math.prod(get(key) or 0 for key in keys) if keys else 0


def fused_rows(key: str, parts: tuple[str, ...], rows: int, get: Get) -> tuple[int, int]:
    """(first row, rows) of matrix `key` within the fused tensor of `parts`, which has `rows` in all."""
    if "attention.q" in parts:
        query, value = (get(k) or get("num_attention_heads") for k in ("num_attention_heads", "num_key_value_heads"))
        counts = [query * head_dim(get)] + [value * head_dim(get)] * 2
    else:
        counts = [rows // len(parts)] * len(parts)
    at = parts.index(key)
    return sum(counts[:at]), counts[at]
