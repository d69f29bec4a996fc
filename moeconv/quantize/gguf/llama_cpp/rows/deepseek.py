"""DeepSeek V2 and V3, and the families with their latent attention: Kimi K2, GLM-4.7-Flash, Youtu."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moeconv.families.model import Model
from moeconv.families.placement import Get
from moeconv.quantize.gguf.llama_cpp.expression import Expression
from moeconv.quantize.gguf.llama_cpp.names import layer
from moeconv.quantize.gguf.llama_cpp.numbers import SOFTMAX, always
from moeconv.quantize.gguf.llama_cpp.record import LlamaCpp, Number
from moeconv.quantize.gguf.llama_cpp.rope import rope_of
from moeconv.quantize.gguf.llama_cpp.rows.dots import DEEPSEEK_NUMBERS, SIGMOID_SCORES

_NAMES = layer(
    {
        "attention.q_whole": "attn_q.weight", "attention.q_a": "attn_q_a.weight",
        "attention.q_a_norm": "attn_q_a_norm.weight", "attention.q_b": "attn_q_b.weight",
        "attention.kv_a": "attn_kv_a_mqa.weight", "attention.kv_a_norm": "attn_kv_a_norm.weight",
    }
)  # fmt: skip


def split_kv(get: Get, part: Expression) -> Mapping[str, Expression]:
    """The matrix that expands the latent state becomes one for keys, [heads, rank, nope], and one for values,
    [heads, v, rank]: llama.cpp multiplies the queries by the former, and stores the latent state alone."""
    keys, values = get("qk_nope_head_dim"), get("v_head_dim")
    heads = part.reshape(-1, keys + values, part.shape[-1])
    k, v = heads.split(1, (keys, values))
    return {"blk.{L}.attn_k_b.weight": k.permute(0, 2, 1), "blk.{L}.attn_v_b.weight": v}


def _low_rank_queries(model: Model) -> str | None:
    """llama.cpp recognises models without low-rank queries by their number of layers (deepseek2.cpp)."""
    lite = model.num_layers in (26, 27) or (model.num_layers == 48 and model.value("vocab_size") == 128256)
    if lite == (model.value("q_lora_rank") is None):
        return None
    return "low-rank queries at this number of layers" if lite else "queries without low rank at this number of layers"


def _scaled_attention(model: Model) -> str | None:
    """transformers scales attention by mscale_all_dim, and cosines by the ratio of mscale to it, which must be 1."""
    rope = rope_of(model)
    if rope["rope_type"] != "yarn" or rope.get("mscale", 1.0) == rope.get("mscale_all_dim", 0):
        return None
    return "yarn with mscale other than mscale_all_dim"


def _log_multiplier(model: Model) -> float | None:
    rope: dict[str, Any] = rope_of(model)
    found = rope.get("mscale_all_dim") if rope["rope_type"] == "yarn" else None
    return None if not found else 0.1 * found


_NUMBERS: dict[str, Number] = {
    "attention.head_count_kv": always(1),
    "attention.q_lora_rank": "q_lora_rank",
    "attention.kv_lora_rank": "kv_lora_rank",
    "attention.key_length": lambda model: model.value("kv_lora_rank") + model.value("qk_rope_head_dim"),
    "attention.value_length": "kv_lora_rank",
    "attention.key_length_mla": lambda model: model.value("qk_nope_head_dim") + model.value("qk_rope_head_dim"),
    "attention.value_length_mla": "v_head_dim",
    "rope.dimension_count": "qk_rope_head_dim",
    "rope.scaling.yarn_log_multiplier": _log_multiplier,
}
V3 = LlamaCpp(
    "deepseek2",
    names=_NAMES,
    changes={"attention.kv_b": split_kv},
    needs={"attention_bias": (False,), "rope_interleave": (True,), "mlp_bias": (False,)},
    checks=(_low_rank_queries, _scaled_attention),
    numbers=DEEPSEEK_NUMBERS | SIGMOID_SCORES | _NUMBERS,
    rope=frozenset({"default", "yarn"}),
    dense_layers="first",
)

ROWS = {
    "deepseek_v2": replace(
        V3,
        needs=dict(V3.needs) | {"topk_method": ("greedy",), "norm_topk_prob": (False,)},
        numbers={
            **V3.numbers,
            "expert_gating_func": always(SOFTMAX),
            "expert_group_count": always(None),
            "expert_group_used_count": always(None),
        },
    ),
    "deepseek_v3": V3,
    "glm4_moe_lite": V3,
    "youtu": replace(
        V3,
        numbers=_NUMBERS
        | {
            "leading_dense_block_count": lambda model: model.num_layers,
            "expert_feed_forward_length": "intermediate_size",
            "expert_shared_count": always(0),
        },
    ),
}
