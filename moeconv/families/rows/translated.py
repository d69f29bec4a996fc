"""Translated: Lara Mini, which mixes linear attention, sliding windows and full attention."""

from __future__ import annotations

from moeconv.families.blocks import BASE_CONFIG, BLOCK, LAYER, O_BIAS, QK_NORM, QKV_BIAS
from moeconv.families.expert_blocks import MLP_ROUTER, ROUTER_LOSS, SHARED_EXPERT, STACKED, STACKED_NAMES, moe_row
from moeconv.families.placement import Get
from moeconv.families.records import ConfigKeys, Experts, Layers, Routing, Tensors
from moeconv.families.rows.qwen3_5 import LINEAR_ATTENTION, QWEN3_5_WHERE
from moeconv.families.vendor import Vendor

_PERIOD = ("linear_attention", "sliding_attention", "linear_attention", "full_attention", "sliding_attention")


def _kinds(get: Get, layers: int) -> list[str]:
    """The kind of each layer's token mixer: if config.json does not list them, they repeat every five layers."""
    return get("layer_types") or [_PERIOD[i % len(_PERIOD)] for i in range(layers)]


LARA_MINI = moe_row(
    "lara_mini",
    "LaraMiniForCausalLM",
    config=ConfigKeys(
        {
            "num_key_value_heads": 4,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "sliding_window": 512,
            "layer_types": None,
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_num_key_heads": 8,
            "linear_num_value_heads": 16,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "norm_topk_prob": True,
            **ROUTER_LOSS,
        }
    ),
    tensors=Tensors(
        BLOCK
        | QKV_BIAS
        | O_BIAS
        | QK_NORM
        | {key: name for key, name in LINEAR_ATTENTION.items() if key in ("linear.A", "linear.conv", "linear.dt")}
        | {
            "linear.qkvzba": LAYER + "linear_attn.in_proj.weight",
            "linear.norm": LAYER + "linear_attn.out_norm.weight",
            "linear.out": LINEAR_ATTENTION["linear.out"],
        }
        | MLP_ROUTER
        | STACKED_NAMES
        | SHARED_EXPERT,
        packed=STACKED.packed,
        in_memory={"linear_attn.out_norm": "linear_attn.norm"},
    ),
    layers=Layers(kinds=_kinds, where=QWEN3_5_WHERE),
    experts=Experts(
        count=("num_experts",),
        width="moe_intermediate_size",
        shared_width=("shared_expert_intermediate_size",),
        routing=Routing("softmax", "norm_topk_prob", float32=True),
    ),
    base={key: value for key, value in BASE_CONFIG.items() if key != "intermediate_size"},
)

VENDOR = Vendor(
    moe=(LARA_MINI,),
)
