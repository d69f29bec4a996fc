"""Reflection AI: Beam."""

from __future__ import annotations

from moeconv.families import placement, sliding
from moeconv.families.blocks import BLOCK, DENSE_FFN, LAYER, O_BIAS, QK_NORM, QKV_BIAS
from moeconv.families.expert_blocks import CORRECTION, GROUPED, LOSS_OFF, MLP_EXPERTS, MLP_ROUTER, moe_row
from moeconv.families.records import NUMBER, Attention, ConfigKeys, Experts, Tensors
from moeconv.families.vendor import Vendor

BEAM = moe_row(
    "beam",
    "BeamForCausalLM",
    config=ConfigKeys(
        {
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 8192,
            # layers with a window rotate, the others scale their queries by the position
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": None,
            },
            "attention_bias": False,
            "sliding_window": 512,
            "layer_types": None,
            "mlp_layer_types": None,
            "moe_intermediate_size": 2560,
            "n_group": 8,
            "topk_group": 4,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "final_logit_softcapping": 30.0,
            **LOSS_OFF,
        },
        kinds={"final_logit_softcapping": NUMBER},
    ),
    tensors=Tensors(
        BLOCK
        | QKV_BIAS
        | O_BIAS
        | QK_NORM
        | {
            "attention.gate": LAYER + "self_attn.gate_proj.weight",
            "attention.gate_of_head": LAYER + "self_attn.gate_bias",
            "norm.post_attention": LAYER + "post_attention_layernorm.weight",
            "norm.ffn": LAYER + "pre_feedforward_layernorm.weight",
            "norm.post_ffn": LAYER + "post_feedforward_layernorm.weight",
        }
        | MLP_ROUTER
        | CORRECTION
        | MLP_EXPERTS
        | DENSE_FFN,
        float32=frozenset({"router.weight", "router.correction"}),
    ),
    attention=Attention(sliding=sliding.ALL_BUT_SIXTH_AND_LAST, rope="own"),
    experts=Experts(
        count=("num_experts",),
        width="moe_intermediate_size",
        placement=placement.WORDS_FIRST_THREE_DENSE,
        routing=GROUPED,
    ),
)

VENDOR = Vendor(
    moe=(BEAM,),
)
