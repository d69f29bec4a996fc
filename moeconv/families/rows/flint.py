"""Recursive Superintelligence: Flint."""

from __future__ import annotations

from moeconv.families import placement, sliding
from moeconv.families.blocks import BLOCK, DENSE_FFN, LAYER, O_BIAS, QK_NORM, QKV_BIAS
from moeconv.families.expert_blocks import MLP_EXPERTS, MLP_ROUTER, ROUTER_LOSS, SHARED_EXPERT, moe_row
from moeconv.families.records import LIST, Attention, ConfigKeys, Experts, Routing, Tensors
from moeconv.families.vendor import Vendor

FLINT = moe_row(
    "flint",
    "FlintForCausalLM",
    config=ConfigKeys(
        {
            "num_key_value_heads": 4,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "attention_bias": False,
            "sliding_window": 513,
            "layer_types": None,
            "decoder_sparse_step": 1,
            "mlp_only_layers": None,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 1024,
            "norm_topk_prob": True,
            **ROUTER_LOSS,
            "router_aux_loss_coef": 0.0005,
        },
        kinds={"mlp_only_layers": LIST},
        derived={"mlp_only_layers": lambda _get: [0, 1]},
    ),
    tensors=Tensors(
        BLOCK
        | QKV_BIAS
        | O_BIAS
        | QK_NORM
        | {"attention.sinks": LAYER + "self_attn.softmax_offset"}
        | MLP_ROUTER
        | MLP_EXPERTS
        | SHARED_EXPERT
        | DENSE_FFN,
        float32=frozenset({"router.weight", "attention.sinks"}),
    ),
    attention=Attention(sliding=sliding.BETWEEN_THE_ENDS),
    experts=Experts(
        count=("num_experts",),
        width="moe_intermediate_size",
        shared_width=("shared_expert_intermediate_size",),
        placement=placement.LIST,
        routing=Routing("sigmoid", "norm_topk_prob", float32=True),
    ),
)

VENDOR = Vendor(
    moe=(FLINT,),
)
