"""Sizes of tensors from config.json, where a planner must know them before any file exists."""

from __future__ import annotations

import math
from collections.abc import Mapping

from moeconv.families.placement import Get

# key -> its dimensions by name; a key that is missing here is never made from nothing
_SHAPES: Mapping[str, tuple[str, ...]] = {
    "attention.q_bias": ("query",),
    "attention.k_bias": ("value",),
    "attention.v_bias": ("value",),
    "attention.o_bias": ("hidden",),
    "attention.sinks": ("heads",),
    "norm.attention": ("hidden",),
    "norm.ffn": ("hidden",),
    "norm.final": ("hidden",),
    "norm.post_shared": ("hidden",),
    "norm.post_experts": ("hidden",),
    "router.weight": ("experts", "hidden"),
    "router.bias": ("experts",),
    "router.correction": ("experts",),
    "router.scale": ("experts",),
    "router.correction_row": ("one", "experts"),
    "shared.router": ("one", "hidden"),
    "shared.gate": ("shared", "hidden"),
    "shared.up": ("shared", "hidden"),
    "shared.down": ("hidden", "shared"),
    "ffn.gate_bias": ("width",),
    "ffn.up_bias": ("width",),
    "ffn.down_bias": ("hidden",),
}


def head_dim(get: Get) -> int:
    """Rows of an attention head: what config says, else hidden_size / heads."""
    return get("head_dim") or get("hidden_size") // get("num_attention_heads")


def shape_of(key: str, get: Get, *, experts: int, width: int, shared: int) -> tuple[int, ...]:
    """The shape of the matrix `key` in a model of this config. Raises KeyError where no rule is known."""
    heads = get("num_attention_heads")
    sizes = {
        "one": 1,
        "hidden": get("hidden_size"),
        "heads": heads,
        "query": heads * head_dim(get),
        "value": (get("num_key_value_heads") or heads) * head_dim(get),
        "experts": experts,
        "width": width,
        "shared": shared,
    }
    return tuple(sizes[name] for name in _SHAPES[key])


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
