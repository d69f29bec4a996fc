"""Stability AI: StableLM."""

from __future__ import annotations

from moeconv.families.blocks import BLOCK, DENSE_FFN, NORM_BIAS, QKV_BIAS, dense_row
from moeconv.families.records import NUMBER, Attention, ConfigKeys, Tensors
from moeconv.families.vendor import Vendor

STABLELM = dense_row(
    "stablelm",
    "StableLmForCausalLM",
    config=ConfigKeys(
        {
            "num_key_value_heads": 32,
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "use_qkv_bias": False,
            "qk_layernorm": False,
            "use_parallel_residual": False,
            "partial_rotary_factor": None,
            "rotary_scaling_factor": None,
        },
        kinds={"rotary_scaling_factor": NUMBER},
        neutral={"qk_layernorm": (False,), "use_parallel_residual": (False,), "rotary_scaling_factor": (None, 1.0)},
    ),
    tensors=Tensors(
        BLOCK | NORM_BIAS | QKV_BIAS | DENSE_FFN,
        optional=frozenset({"norm.ffn"}),  # a model with parallel residual connections has none
    ),
    attention=Attention(partial=0.25),
)

VENDOR = Vendor(
    dense=(STABLELM,),
)
