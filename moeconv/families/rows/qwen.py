"""Alibaba: Qwen2 and Qwen3, their Mixture-of-Experts, and Qwen3-VL."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moeconv.families import placement
from moeconv.families.blocks import BASE_CONFIG, BLOCK, DENSE_FFN, O_BIAS, QK_NORM, QKV_BIAS, ROTARY_BUFFERS
from moeconv.families.expert_blocks import (
    EXPERT_COUNT,
    MLP_EXPERTS,
    MLP_ROUTER,
    ROUTER_LOSS,
    SHARED_EXPERT,
    SHARED_GATE,
    STACKED,
    STACKED_NAMES,
    TOP_K,
    ZERO_SHARED_128,
)
from moeconv.families.sliding import LAYER_TYPES, LAYER_TYPES_ALTERNATING, NEVER, SWITCH
from moeconv.families.spec import Family, Layout, Pair, Routing
from moeconv.families.vendor import Vendor, Wrapper

_QWEN_SLIDING = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    kind="dense",
    tensors=BLOCK | QKV_BIAS | DENSE_FFN,
    optional=frozenset({"embedding.lm_head"}),
    dropped=ROTARY_BUFFERS,
    config=BASE_CONFIG | {"num_key_value_heads": 32, "max_position_embeddings": 32768} | _QWEN_SLIDING,
    sliding=LAYER_TYPES,
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    kind="dense",
    tensors=BLOCK | QK_NORM | QKV_BIAS | O_BIAS | DENSE_FFN,
    optional=frozenset({"embedding.lm_head", *QKV_BIAS, *O_BIAS}),
    dropped=ROTARY_BUFFERS,
    config=BASE_CONFIG
    | {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768, "attention_bias": False}
    | _QWEN_SLIDING,
    sliding=LAYER_TYPES,
)
_QWEN_MOE: dict[str, Any] = {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": False}
QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    kind="moe",
    tensors=BLOCK | QKV_BIAS | MLP_ROUTER | MLP_EXPERTS | SHARED_EXPERT | SHARED_GATE | DENSE_FFN,
    optional=frozenset({"embedding.lm_head", *QKV_BIAS}),
    dropped=ROTARY_BUFFERS,
    config=BASE_CONFIG
    | {
        "num_key_value_heads": 16,
        "head_dim": None,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "qkv_bias": True,
    }
    | _QWEN_MOE
    | ROUTER_LOSS,
    sliding=LAYER_TYPES_ALTERNATING,
    num_experts=EXPERT_COUNT,
    top_k=TOP_K,
    expert_width="moe_intermediate_size",
    shared_width=("shared_expert_intermediate_size",),
    shared_weight=0.5,  # sigmoid(0) of its gate
    placement=placement.LIST,
    routing=Routing("softmax", "norm_topk_prob"),
)
QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    kind="moe",
    tensors=BLOCK | QK_NORM | QKV_BIAS | O_BIAS | MLP_ROUTER | MLP_EXPERTS | DENSE_FFN,
    optional=frozenset({"embedding.lm_head", *QKV_BIAS, *O_BIAS}),
    dropped=ROTARY_BUFFERS,
    config=BASE_CONFIG
    | {
        "num_key_value_heads": 4,
        "head_dim": None,
        "max_position_embeddings": 32768,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "moe_intermediate_size": 768,
    }
    | _QWEN_MOE
    | ROUTER_LOSS,
    sliding=SWITCH,
    num_experts=EXPERT_COUNT,
    top_k=TOP_K,
    expert_width="moe_intermediate_size",
    placement=placement.LIST,
    routing=Routing("softmax", "norm_topk_prob"),
)
_TRANSPOSED = Layout(STACKED_NAMES, {key: replace(way, transposed=True) for key, way in STACKED.packed.items()})
# router weights are renormalised whatever the config says; saved untransposed by transformers 5, transposed on the hub
QWEN3_VL_MOE_TEXT = replace(
    QWEN3_MOE,
    model_type="qwen3_vl_moe_text",
    tensors={k: v for k, v in QWEN3_MOE.tensors.items() if k not in MLP_EXPERTS} | STACKED_NAMES,
    config={k: v for k, v in QWEN3_MOE.config.items()
            if k not in ("norm_topk_prob", "use_sliding_window", "sliding_window")}
    | {"num_key_value_heads": 16, "max_position_embeddings": 128000, "rope_theta": 500000.0,
       "moe_intermediate_size": 1408},
    packed=STACKED.packed,
    layouts=(STACKED, _TRANSPOSED),
    sliding=NEVER,
    routing=Routing("softmax", "always"),
)  # fmt: skip

_QWEN: dict[str, Any] = {"norm_topk_prob": True, "decoder_sparse_step": 1}
_QWEN2_MOE = _QWEN | {"shared_expert_intermediate_size": 128}
VENDOR = Vendor(
    dense=(QWEN2, QWEN3),
    moe=(QWEN2_MOE, QWEN3_MOE),
    pairs=(
        Pair("llama", "qwen2_moe", note=ZERO_SHARED_128, config=_QWEN2_MOE | {"qkv_bias": False}),
        Pair("qwen2", "qwen2_moe", default=True, note=ZERO_SHARED_128, config=_QWEN2_MOE | {"qkv_bias": True}),
        Pair(
            "seed_oss",
            "qwen2_moe",
            default=True,
            note=ZERO_SHARED_128,
            config=_QWEN2_MOE,
            rename={"attention_bias": "qkv_bias"},
        ),
        Pair("ministral", "qwen2_moe", default=True, note=ZERO_SHARED_128, config=_QWEN2_MOE | {"qkv_bias": False}),
        Pair("cwm", "qwen2_moe", default=True, note=ZERO_SHARED_128, config=_QWEN2_MOE | {"qkv_bias": False}),
        Pair("qwen3", "qwen3_moe", default=True, config=_QWEN),
    ),
    wrappers=(
        Wrapper(
            "qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", (QWEN3_VL_MOE_TEXT,), {"model.visual.": "vision"}
        ),
    ),
)
