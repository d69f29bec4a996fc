"""JetBrains: Mellum."""

from __future__ import annotations

from moeconv.families import placement, sliding
from moeconv.families.blocks import BLOCK, DENSE_FFN, O_BIAS, QK_NORM, QKV_BIAS
from moeconv.families.expert_blocks import MLP_EXPERTS, MLP_ROUTER, ROUTER_LOSS, moe_row
from moeconv.families.records import Attention, ConfigKeys, Elsewhere, Experts, Routing, Tensors
from moeconv.families.spec import Pair
from moeconv.families.vendor import Vendor

MELLUM = moe_row(
    "mellum",
    "MellumForCausalLM",
    config=ConfigKeys(
        {
            "num_key_value_heads": 4,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "attention_bias": False,
            "rope_theta": 500000.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 500000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
            "sliding_window": 1024,
            "layer_types": None,
            "mlp_layer_types": None,
            "moe_intermediate_size": 896,
            "norm_topk_prob": True,
            "num_nextn_predict_layers": None,
            **ROUTER_LOSS,
        }
    ),
    tensors=Tensors(BLOCK | QK_NORM | QKV_BIAS | O_BIAS | MLP_ROUTER | MLP_EXPERTS | DENSE_FFN),
    attention=Attention(sliding=sliding.NO_LAYER, rope="per_type"),
    experts=Experts(
        width="moe_intermediate_size", placement=placement.WORDS, routing=Routing("softmax", "norm_topk_prob")
    ),
    # vLLM adds this number to that of the layers, and fails on null, which transformers writes if there are none
    elsewhere=Elsewhere(keys={"num_nextn_predict_layers": 0}, runs=frozenset({"vllm", "llama.cpp"})),
)

VENDOR = Vendor(
    moe=(MELLUM,),
    pairs=(Pair("qwen3", "mellum", config={"norm_topk_prob": True, "num_nextn_predict_layers": 0}),),
)
