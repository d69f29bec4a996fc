"""Ai2: OLMo, OLMoE, and FlexOlmo."""

from __future__ import annotations

from moeconv.families import sliding
from moeconv.families.blocks import (
    ATTENTION_BIAS,
    BLOCK,
    DENSE_FFN,
    LAYER,
    NO_BIAS,
    O_BIAS,
    QK_NORM,
    QKV_BIAS,
    dense_row,
)
from moeconv.families.expert_blocks import EVERY_ENGINE, MLP_EXPERTS, MLP_ROUTER, moe_row
from moeconv.families.records import Attention, ConfigKeys, Elsewhere, Experts, Routing, Tensors
from moeconv.families.shapes import WHOLE_ROW_NORMS
from moeconv.families.spec import Pair
from moeconv.families.vendor import Vendor

POST_NORM = {
    "norm.attention": LAYER + "post_attention_layernorm.weight",
    "norm.ffn": LAYER + "post_feedforward_layernorm.weight",
}
OLMO = dense_row(
    "olmo",
    "OlmoForCausalLM",
    config=ConfigKeys(
        {"rms_norm_eps": None, "attention_bias": False, "clip_qkv": None}, neutral=NO_BIAS | {"clip_qkv": (None,)}
    ),
    tensors=Tensors({k: v for k, v in (BLOCK | ATTENTION_BIAS | DENSE_FFN).items() if not k.startswith("norm.")}),
)
OLMO2 = dense_row(
    "olmo2",
    "Olmo2ForCausalLM",
    config=ConfigKeys({"rms_norm_eps": 1e-5, "attention_bias": False}),
    tensors=Tensors(BLOCK | POST_NORM | ATTENTION_BIAS | QK_NORM | DENSE_FFN, shapes=WHOLE_ROW_NORMS),
)
OLMO3 = dense_row(
    "olmo3",
    "Olmo3ForCausalLM",
    config=ConfigKeys(
        {
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "attention_bias": False,
            "sliding_window": 4096,
            "layer_types": None,
        }
    ),
    tensors=Tensors(BLOCK | POST_NORM | ATTENTION_BIAS | QK_NORM | DENSE_FFN, shapes=WHOLE_ROW_NORMS),
    attention=Attention(sliding=sliding.ALL_BUT_LAST_OF_FOUR, rope="per_type"),
)
OLMOE = moe_row(
    "olmoe",
    "OlmoeForCausalLM",
    config=ConfigKeys(
        {
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "attention_bias": False,
            "clip_qkv": None,
            "norm_topk_prob": False,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.01,
        }
    ),
    tensors=Tensors(BLOCK | QK_NORM | QKV_BIAS | O_BIAS | MLP_ROUTER | MLP_EXPERTS, shapes=WHOLE_ROW_NORMS),
    experts=Experts(routing=Routing("softmax", "norm_topk_prob")),
    elsewhere=Elsewhere(runs=EVERY_ENGINE),
)
FLEX_OLMO = moe_row(
    "flex_olmo",
    "FlexOlmoForCausalLM",
    config=ConfigKeys(
        {
            "max_position_embeddings": 4096,
            "rope_theta": 500000.0,
            "head_dim": None,
            "attention_bias": False,
            "norm_topk_prob": False,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.01,
        }
    ),
    tensors=Tensors(BLOCK | POST_NORM | QKV_BIAS | O_BIAS | QK_NORM | MLP_ROUTER | MLP_EXPERTS, shapes=WHOLE_ROW_NORMS),
    experts=Experts(count=("num_experts",), routing=Routing("softmax", "norm_topk_prob")),
    elsewhere=Elsewhere(runs=frozenset({"vllm"}), runs_not=frozenset({"sglang", "llama.cpp"})),
)

VENDOR = Vendor(
    dense=(OLMO, OLMO2, OLMO3),
    moe=(OLMOE, FLEX_OLMO),
    pairs=(
        Pair("olmo2", "flex_olmo", default=True, config={"norm_topk_prob": True}),
        Pair(
            "olmo3",
            "flex_olmo",
            default=True,
            note="without sliding layers, which every published OLMo-3 has",
            config={"norm_topk_prob": True},
        ),
    ),
)
