"""Aleph Alpha: Kolibri."""

from __future__ import annotations

from moeconv.families import sliding
from moeconv.families.blocks import BASE_CONFIG, BLOCK, LAYER, QK_NORM
from moeconv.families.expert_blocks import LOSS_OFF, MLP_EXPERTS, MLP_ROUTER, SHARED_EXPERTS, moe_row
from moeconv.families.records import Attention, ConfigKeys, Experts, Routing, Tensors
from moeconv.families.vendor import Vendor

KOLIBRI1 = moe_row(
    "kolibri1",
    "Kolibri1ForCausalLM",
    config=ConfigKeys(
        {
            "num_key_value_heads": 4,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "sliding_window": 513,
            "layer_types": None,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "norm_topk_prob": False,
            **LOSS_OFF,
        }
    ),
    tensors=Tensors(
        BLOCK
        | QK_NORM
        | {
            "norm.post_attention": LAYER + "post_attn_norm.weight",
            "norm.post_ffn": LAYER + "post_ffn_norm.weight",
            "router.correction": LAYER + "moe.router.expert_bias",
        }
        | MLP_ROUTER
        | MLP_EXPERTS
        | SHARED_EXPERTS,
        float32=frozenset({"router.correction"}),
    ),
    attention=Attention(sliding=sliding.ALL_BUT_LAST_OF_FIVE),
    experts=Experts(
        width="moe_intermediate_size",
        shared_width=("shared_expert_intermediate_size",),
        # the correction is added to the logits, not to their sigmoids
        routing=Routing("sigmoid", "norm_topk_prob", float32=True),
    ),
    base={key: value for key, value in BASE_CONFIG.items() if key != "intermediate_size"},
)

VENDOR = Vendor(
    moe=(KOLIBRI1,),
)
