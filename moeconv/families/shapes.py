"""Shapes of tensors from config.json: one expression per key, over sizes that are computed from config keys.

A planner needs the shapes before any file exists; opening a checkpoint compares every header with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moeconv.families.placement import Get


@dataclass(frozen=True, slots=True)
class Place:
    """The layer of a tensor, and whether that layer attends through a window."""

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
    "attention.gate_of_head": "heads",
    "attention.sinks": "heads",
    "attention.q_whole": "heads*nope + heads*rope, hidden",
    "attention.q_a": "q_rank, hidden",
    "attention.q_a_norm": "q_rank",
    "attention.q_b": "heads*nope + heads*rope, q_rank",
    "attention.kv_a": "kv_rank + rope, hidden",
    "attention.kv_a_norm": "kv_rank",
    "attention.kv_b": "heads*nope + heads*v_latent, kv_rank",
    "indexer.q": "index_heads*index_head, q_rank",
    "indexer.k": "index_head, hidden",
    "indexer.k_norm": "index_head",
    "indexer.k_norm_bias": "index_head",
    "indexer.weights": "index_heads, hidden",
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
    "linear.qkvzba": "2*linear_key + 2*linear_value + 2*linear_v_heads, hidden",
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
# shapes for the rows of families that differ from the table above
WHOLE_ROW_NORMS = {"attention.q_norm": "heads*head", "attention.k_norm": "kv*head"}
GATED_QUERY = {"attention.q": "2*heads*head, hidden", "attention.q_bias": "2*heads*head"}
NORM_OF_EACH_HEAD = {"attention.q_norm": "heads, head", "attention.k_norm": "kv, head"}
LATENT = {"attention.o": "hidden, heads*v_latent"}


def head_dim(get: Get) -> int:
    """Rows of an attention head: head_dim of config.json, else hidden_size / num_attention_heads."""
    rows: int = get("head_dim") or get("hidden_size") // get("num_attention_heads")
    return rows


def config_key(key: str) -> Size:
    """The size that is the value of a config key."""
    return lambda get, _place: get(key)


# name of a size -> its value; a row's `sizes` take precedence
_SIZES: Mapping[str, Size] = {
    "hidden": config_key("hidden_size"),
    "vocab": config_key("vocab_size"),
    "heads": config_key("num_attention_heads"),
    "kv": lambda get, _place: get("num_key_value_heads") or get("num_attention_heads"),
    "head": lambda get, _place: head_dim(get),
    "v_head": lambda get, _place: head_dim(get),
    "q_rank": config_key("q_lora_rank"),
    "kv_rank": config_key("kv_lora_rank"),
    "nope": config_key("qk_nope_head_dim"),
    "rope": config_key("qk_rope_head_dim"),
    "v_latent": config_key("v_head_dim"),
    "index_heads": config_key("index_n_heads"),
    "index_head": config_key("index_head_dim"),
    "conv_kernel": config_key("conv_L_cache"),
    "linear_v_heads": config_key("linear_num_value_heads"),
    "linear_v_head": config_key("linear_value_head_dim"),
    "linear_key": lambda get, _place: get("linear_num_key_heads") * get("linear_key_head_dim"),
    "linear_value": lambda get, _place: get("linear_num_value_heads") * get("linear_value_head_dim"),
    "linear_kernel": config_key("linear_conv_kernel_dim"),
    "mamba_heads": config_key("mamba_n_heads"),
    "mamba_inner": lambda get, _place: int(get("mamba_expand") * get("hidden_size")),
    "mamba_groups": config_key("mamba_n_groups"),
    "mamba_state": config_key("mamba_d_state"),
    "mamba_kernel": config_key("mamba_d_conv"),
    "mamba_rank": lambda get, _place: _mamba_rank(get("mamba_dt_rank"), get("hidden_size")),
}


def _mamba_rank(rank: object, hidden: int) -> Any:
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

    `counts` are functions for the sizes that the caller knows (experts, width, expert, shared), called only if the
    expression uses them. `shapes` and `sizes` are those of the family's row. Raises KeyError if there is no expression
    for the key, or config.json does not state a size.
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
    """The width of the shared expert in neurons: the product of the values of `keys`; 0 if there are none."""
    return math.prod(get(key) or 0 for key in keys) if keys else 0


def fused_rows(key: str, parts: tuple[str, ...], rows: int, get: Get) -> tuple[int, int]:
    """(first row, number of rows) of matrix `key` in the fused tensor of `parts`, which has `rows` rows in total."""
    if parts[0] in ("attention.q", "attention.q_bias"):
        query, value = (get(k) or get("num_attention_heads") for k in ("num_attention_heads", "num_key_value_heads"))
        counts = [query * head_dim(get)] + [value * head_dim(get)] * 2
    else:
        counts = [rows // len(parts)] * len(parts)
    at = parts.index(key)
    return sum(counts[:at]), counts[at]


def grouped_rows(key: str, parts: tuple[str, ...], get: Get) -> list[tuple[int, int]]:
    """The (first, end) rows of matrix `key` in a fused tensor of `parts` (queries, keys, values) that holds, for every
    head of keys and values, the queries that attend to it, then the keys, then the values."""
    head, count = head_dim(get), get("num_key_value_heads") or get("num_attention_heads")
    each = [get("num_attention_heads") // count * head, head, head]
    at = parts.index(key)
    starts = (group * sum(each) + sum(each[:at]) for group in range(count))
    return [(start, start + each[at]) for start in starts]
