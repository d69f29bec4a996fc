"""Arcee AI: AFM and Trinity (afmoe)."""

from __future__ import annotations

from moeconv.families import placement, sliding
from moeconv.families.blocks import (
    ATTENTION_BIAS,
    BLOCK,
    DENSE_FFN,
    FFN_BIAS,
    LAYER,
    NO_BIAS,
    O_BIAS,
    QK_NORM,
    QKV_BIAS,
    dense_row,
)
from moeconv.families.expert_blocks import EVERY_ENGINE, LOSS_OFF, MLP_EXPERTS, SHARED_EXPERTS, moe_row
from moeconv.families.records import Attention, ConfigKeys, Elsewhere, Experts, Routing, Tensors
from moeconv.families.vendor import Vendor

ARCEE = dense_row(
    "arcee",
    "ArceeForCausalLM",
    config=ConfigKeys(
        {
            "head_dim": None,
            "hidden_act": "relu2",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "attention_bias": False,
            "mlp_bias": False,
        },
        neutral=NO_BIAS,
    ),
    tensors=Tensors(BLOCK | ATTENTION_BIAS | {k: v for k, v in (DENSE_FFN | FFN_BIAS).items() if ".gate" not in k}),
)
AFMOE = moe_row(
    "afmoe",
    "AfmoeForCausalLM",
    config=ConfigKeys(
        {
            "max_position_embeddings": 16384,
            "rms_norm_eps": 1e-5,
            "head_dim": 128,
            "attention_bias": False,
            "sliding_window": 1024,
            "global_attn_every_n_layers": 4,
            "layer_types": None,
            "moe_intermediate_size": 1408,
            "num_dense_layers": 1,
            "num_shared_experts": 2,
            "route_scale": 1.0,
            "mup_enabled": False,
            **LOSS_OFF,
        }
    ),
    tensors=Tensors(
        BLOCK
        | QKV_BIAS
        | O_BIAS
        | QK_NORM
        | {
            "norm.post_attention": LAYER + "post_attention_layernorm.weight",
            "norm.ffn": LAYER + "pre_mlp_layernorm.weight",
            "norm.post_ffn": LAYER + "post_mlp_layernorm.weight",
            "attention.gate": LAYER + "self_attn.gate_proj.weight",
            "router.weight": LAYER + "mlp.router.gate.weight",
            "router.correction": LAYER + "mlp.expert_bias",
        }
        | MLP_EXPERTS
        | SHARED_EXPERTS
        | DENSE_FFN,
        optional=frozenset(SHARED_EXPERTS),
        float32=frozenset({"router.correction"}),
    ),
    attention=Attention(sliding=sliding.ALL_BUT_GLOBAL),
    experts=Experts(
        count=("num_experts",),
        width="moe_intermediate_size",
        shared_width=("moe_intermediate_size", "num_shared_experts"),
        placement=placement.NUM_DENSE,
        routing=Routing("sigmoid", "always", scaling="route_scale"),
    ),
    elsewhere=Elsewhere(
        keys={"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1}, runs=EVERY_ENGINE
    ),
)

VENDOR = Vendor(
    dense=(ARCEE,),
    moe=(AFMOE,),
)
