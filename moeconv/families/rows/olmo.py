"""Ai2: OLMo, OLMoE, and FlexOlmo."""

from __future__ import annotations

from moeconv.families import sliding
from moeconv.families.blocks import (
    ATTENTION_BIAS,
    BASE_CONFIG,
    BLOCK,
    DENSE_FFN,
    LAYER,
    NO_BIAS,
    O_BIAS,
    QK_NORM,
    QKV_BIAS,
    ROTARY_BUFFERS,
    dense_row,
)
from moeconv.families.expert_blocks import EXPERT_COUNT, MLP_EXPERTS, MLP_ROUTER, TOP_K, moe_row
from moeconv.families.shapes import WHOLE_ROW_NORMS
from moeconv.families.spec import Family, Pair, Routing
from moeconv.families.vendor import Vendor

POST_NORM = {
    "norm.attention": LAYER + "post_attention_layernorm.weight",
    "norm.ffn": LAYER + "post_feedforward_layernorm.weight",
}
OLMO = dense_row(
    "olmo",
    "OlmoForCausalLM",
    {"rms_norm_eps": None, "attention_bias": False, "clip_qkv": None},
    tensors={k: v for k, v in (BLOCK | ATTENTION_BIAS | DENSE_FFN).items() if not k.startswith("norm.")},
    neutral=NO_BIAS | {"clip_qkv": (None,)},
)
OLMO2 = dense_row(
    "olmo2",
    "Olmo2ForCausalLM",
    {"rms_norm_eps": 1e-5, "attention_bias": False},
    tensors=BLOCK | POST_NORM | ATTENTION_BIAS | QK_NORM | DENSE_FFN,
    shapes=WHOLE_ROW_NORMS,
)
OLMO3 = dense_row(
    "olmo3",
    "Olmo3ForCausalLM",
    {
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "attention_bias": False,
        "sliding_window": 4096,
        "layer_types": None,
    },
    tensors=BLOCK | POST_NORM | ATTENTION_BIAS | QK_NORM | DENSE_FFN,
    sliding=sliding.ALL_BUT_LAST_OF_FOUR,
    rope="per_type",
    shapes=WHOLE_ROW_NORMS,
)
OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    kind="moe",
    tensors=BLOCK | QK_NORM | QKV_BIAS | O_BIAS | MLP_ROUTER | MLP_EXPERTS,
    optional=frozenset({"embedding.lm_head", *QKV_BIAS, *O_BIAS}),
    dropped=ROTARY_BUFFERS,
    config=BASE_CONFIG
    | {
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "clip_qkv": None,
        "norm_topk_prob": False,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.01,
    },
    num_experts=EXPERT_COUNT,
    top_k=TOP_K,
    routing=Routing("softmax", "norm_topk_prob"),
    shapes=WHOLE_ROW_NORMS,
)
FLEX_OLMO = moe_row(
    "flex_olmo",
    "FlexOlmoForCausalLM",
    {
        "max_position_embeddings": 4096,
        "rope_theta": 500000.0,
        "head_dim": None,
        "attention_bias": False,
        "norm_topk_prob": False,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.01,
    },
    BLOCK | POST_NORM | QKV_BIAS | O_BIAS | QK_NORM | MLP_ROUTER | MLP_EXPERTS,
    num_experts=("num_experts",),
    routing=Routing("softmax", "norm_topk_prob"),
    shapes=WHOLE_ROW_NORMS,
)

VENDOR = Vendor(
    dense=(OLMO, OLMO2, OLMO3),
    moe=(OLMOE, FLEX_OLMO),
    pairs=(
        Pair("olmo2", "flex_olmo", default=True, config={"norm_topk_prob": True}),
        Pair("olmo3", "flex_olmo", default=True, note="without sliding layers", config={"norm_topk_prob": True}),
    ),
)
