"""Tencent: HY V3."""

from __future__ import annotations

from moeconv.families import placement
from moeconv.families.blocks import BLOCK, DENSE_FFN, FFN_BIAS, LAYER, O_BIAS, QK_NORM, QKV_BIAS
from moeconv.families.expert_blocks import MLP_EXPERTS, SHARED_MLP, ZERO_SHARED_FULL, leading_dense, moe_row
from moeconv.families.records import ConfigKeys, Elsewhere, Experts, Routing, Tensors
from moeconv.families.spec import Pair
from moeconv.families.vendor import Vendor
from moeconv.types import JsonObject

HY_V3 = moe_row(
    "hy_v3",
    "HYV3ForCausalLM",
    config=ConfigKeys(
        {
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rope_theta": 11158840.0,
            "initializer_range": 0.006,
            "attention_bias": False,
            "mlp_bias": False,
            "mlp_layer_types": None,
            "moe_intermediate_size": 1536,
            "num_shared_experts": 1,
            "router_scaling_factor": 2.826,
            "enable_moe_fp32_combine": True,
            "output_router_logits": False,
        }
    ),
    tensors=Tensors(
        BLOCK
        | QK_NORM
        | QKV_BIAS
        | O_BIAS
        | {"router.weight": LAYER + "mlp.router.gate.weight", "router.correction": LAYER + "mlp.expert_bias"}
        | MLP_EXPERTS
        | SHARED_MLP
        | DENSE_FFN
        | FFN_BIAS,
        float32=frozenset({"router.correction"}),
        in_memory={"mlp.shared_mlp.": "mlp.shared_experts."},
    ),
    experts=Experts(
        count=("num_experts",),
        width="moe_intermediate_size",
        shared_width=("moe_intermediate_size", "num_shared_experts"),
        placement=placement.WORDS_FIRST_DENSE,
        routing=Routing("sigmoid", "always", scaling="router_scaling_factor", float32=True),
    ),
    elsewhere=Elsewhere(
        keys={
            "first_k_dense_replace": leading_dense,
            "expert_hidden_dim": "=moe_intermediate_size",
            "route_norm": True,
            "qk_norm": True,
        },
        runs=frozenset({"vllm", "llama.cpp"}),
    ),
)

_HY_V3: JsonObject = {"router_scaling_factor": 1.0, "num_shared_experts": 1, "enable_moe_fp32_combine": True}

VENDOR = Vendor(
    moe=(HY_V3,),
    pairs=(Pair("qwen3", "hy_v3", note=ZERO_SHARED_FULL, config=_HY_V3),),
)
