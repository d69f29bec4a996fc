"""Upstage: Solar Open."""

from __future__ import annotations

from moeconv.families.blocks import BLOCK, QKV_BIAS
from moeconv.families.expert_blocks import (
    CORRECTION,
    GROUPED,
    MLP_EXPERTS,
    MLP_ROUTER,
    ONE_SHARED_EXPERT,
    SHARED_EXPERTS,
    SIGMOID,
    ZERO_SHARED_FULL,
    moe_row,
)
from moeconv.families.records import Attention, ConfigKeys, Elsewhere, Experts, Tensors
from moeconv.families.spec import Pair
from moeconv.families.vendor import Vendor

SOLAR_OPEN = moe_row(
    "solar_open",
    "SolarOpenForCausalLM",
    config=ConfigKeys(
        {
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "head_dim": 128,
            "attention_bias": False,
            "moe_intermediate_size": 1280,
            **SIGMOID,
        }
    ),
    tensors=Tensors(
        BLOCK | QKV_BIAS | MLP_ROUTER | CORRECTION | MLP_EXPERTS | SHARED_EXPERTS,
        float32=frozenset({"router.correction"}),
    ),
    # written although the whole head rotates: without the key, llama.cpp's converter assumes half of it as for GLM-4.5
    attention=Attention(partial=1.0),
    experts=Experts(
        count=("n_routed_experts",),
        width="moe_intermediate_size",
        shared_width=("moe_intermediate_size", "n_shared_experts"),
        routing=GROUPED,
    ),
    elsewhere=Elsewhere(keys={"first_k_dense_replace": 0}, runs=frozenset({"vllm", "llama.cpp"})),
)

VENDOR = Vendor(
    moe=(SOLAR_OPEN,),
    pairs=(
        Pair("llama", "solar_open", note=ZERO_SHARED_FULL, config=ONE_SHARED_EXPERT | {"attention_bias": False}),
        Pair("qwen2", "solar_open", note=ZERO_SHARED_FULL, config=ONE_SHARED_EXPERT | {"attention_bias": True}),
    ),
)
