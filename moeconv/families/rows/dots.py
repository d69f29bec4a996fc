"""rednote: dots.llm1."""

from __future__ import annotations

from moeconv.families import placement, sliding
from moeconv.families.blocks import BLOCK, DENSE_FFN, O_BIAS, QK_NORM, QKV_BIAS
from moeconv.families.expert_blocks import (
    CORRECTION,
    EVERY_ENGINE,
    GROUPED,
    MLP_EXPERTS,
    MLP_ROUTER,
    NO_AUX_LOSS,
    ONE_SHARED_EXPERT,
    SHARED_EXPERTS,
    SIGMOID,
    ZERO_SHARED_FULL,
    moe_row,
)
from moeconv.families.records import Attention, ConfigKeys, Elsewhere, Experts, Tensors
from moeconv.families.spec import Pair
from moeconv.families.vendor import Vendor

DOTS1 = moe_row(
    "dots1",
    "Dots1ForCausalLM",
    config=ConfigKeys(
        {
            "num_key_value_heads": 32,
            "head_dim": None,
            "attention_bias": False,
            "sliding_window": 4096,
            "max_window_layers": 62,
            "layer_types": None,
            "moe_intermediate_size": 1408,
            "first_k_dense_replace": 0,
            **SIGMOID,
            "norm_topk_prob": False,
            "n_shared_experts": None,
        }
    ),
    tensors=Tensors(
        BLOCK | QK_NORM | QKV_BIAS | O_BIAS | MLP_ROUTER | CORRECTION | MLP_EXPERTS | SHARED_EXPERTS | DENSE_FFN,
        float32=frozenset({"router.correction"}),
    ),
    attention=Attention(sliding=sliding.FROM_MAX_WINDOW),
    experts=Experts(
        count=("n_routed_experts",),
        width="moe_intermediate_size",
        shared_width=("moe_intermediate_size", "n_shared_experts"),
        placement=placement.FIRST_K,
        routing=GROUPED,
    ),
    elsewhere=Elsewhere(keys=NO_AUX_LOSS | {"moe_layer_freq": 1}, runs=EVERY_ENGINE),
)

VENDOR = Vendor(
    moe=(DOTS1,),
    pairs=(Pair("qwen3", "dots1", with_shared=True, note=ZERO_SHARED_FULL, config=ONE_SHARED_EXPERT),),
)
