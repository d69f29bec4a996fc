"""What readers of config.json other than transformers 5 look for, as data: words that transformers renamed, aliases of
counts, and keys that a family's class does not read.

Readers: transformers 4.57, vLLM 0.32, SGLang, mlx-lm and the converter of llama.cpp (2026-10). A value is itself, the
"=key" whose value it takes, or a function of the config's values; None leaves the key out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moeconv.families.placement import Get

# every word in use for the same number; a published config may hold several
ALIASES: tuple[tuple[str, ...], ...] = (
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    (
        "num_experts_per_tok", "experts_per_token", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k",
        "top_k_experts",
    ),
    ("moe_intermediate_size", "expert_hidden_dim"),
    ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts"),
)  # fmt: skip


def _leading_dense(get: Get) -> int | None:
    """Dense layers in front of the Mixtures-of-Experts, where no other layer is dense."""
    words = get("mlp_layer_types")
    if words is None:
        return 1
    first = next((i for i, word in enumerate(words) if word == "sparse"), len(words))
    return first if "dense" not in words[first:] else None


def _rotary_dim(get: Get) -> int:
    params = get("rope_parameters") or {}
    return int(get("head_dim") * (params.get("partial_rotary_factor") or get("partial_rotary_factor") or 1.0))


def _per_layer(key: str, word: str) -> Callable[[Get], list[int] | None]:
    def flags(get: Get) -> list[int] | None:
        words = get(key)
        return None if words is None else [int(each == word) for each in words]

    return flags


def _each_layer(value: Callable[[Get], int]) -> Callable[[Get], list[int]]:
    return lambda get: [value(get)] * get("num_hidden_layers")


_NOAUX: dict[str, Any] = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}

# model_type -> keys that some reader needs and transformers 5 does not
READERS: Mapping[str, Mapping[str, Any]] = {
    # without them vLLM and SGLang have no correction bias, and all but transformers score by softmax
    "deepseek_v3": _NOAUX | {"moe_layer_freq": 1},
    "glm4_moe_lite": _NOAUX | {"moe_layer_freq": 1, "first_k_dense_replace": _leading_dense},
    "deepseek_v2": {"scoring_func": "softmax", "moe_layer_freq": 1},
    "dots1": _NOAUX | {"moe_layer_freq": 1},
    "exaone_moe": _NOAUX,
    "hy_v3": {
        "first_k_dense_replace": _leading_dense,
        "expert_hidden_dim": "=moe_intermediate_size",
        "route_norm": True,
        "qk_norm": True,
    },
    "hunyuan_v1_moe": {
        "moe_intermediate_size": _each_layer(lambda get: get("intermediate_size")),
        "num_shared_expert": _each_layer(lambda _get: 1),
        "use_qk_norm": True,
        "use_mixed_mlp_moe": True,
    },
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    "minimax_m2": {
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "rotary_dim": _rotary_dim,
    },
    "mimo_v2_flash": _NOAUX
    | {
        "layernorm_epsilon": "=rms_norm_eps",
        "hybrid_layer_pattern": _per_layer("layer_types", "sliding_attention"),
        "moe_layer_freq": _per_layer("mlp_layer_types", "sparse"),
    },
}
# words of one list in transformers 4 and in transformers 5, where the former reads no others; both know the first
OLD_WORDS: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "granitemoehybrid": {"layer_types": {"linear_attention": "mamba", "full_attention": "attention"}},
}
# model_type -> nested configs, whose class in transformers 4 takes these keys and no other
NESTED: Mapping[str, Mapping[str, frozenset[str]]] = {
    "dbrx": {
        "attn_config": frozenset({"model_type", "attn_pdrop", "clip_qkv", "kv_n_heads", "rope_theta"}),
        "ffn_config": frozenset({
            "model_type", "ffn_act_fn", "ffn_hidden_size", "moe_num_experts", "moe_top_k", "moe_jitter_eps",
            "moe_loss_weight", "moe_normalize_expert_weights",
        }),
    },
}  # fmt: skip
# model_type -> keys that transformers 5 alone reads, with the value that every other reader computes with
FIXED_ELSEWHERE: Mapping[str, Mapping[str, Any]] = {
    "gpt_oss": {"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
}
# families in which every other reader slides in all layers or in none, whatever layer_types says
ONE_WINDOW_ELSEWHERE = frozenset({"qwen2_moe"})
