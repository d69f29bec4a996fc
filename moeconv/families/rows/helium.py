"""Kyutai: Helium."""

from __future__ import annotations

from moeconv.families.blocks import BLOCK, DENSE_FFN, NO_BIAS, QKV_BIAS, dense_row
from moeconv.families.records import Attention, ConfigKeys, Tensors
from moeconv.families.vendor import Vendor

HELIUM = dense_row(
    "helium",
    "HeliumForCausalLM",
    config=ConfigKeys(
        {
            "num_key_value_heads": 20,
            "head_dim": 128,
            "rms_norm_eps": 1e-8,
            "max_position_embeddings": 4096,
            "rope_theta": 100000.0,
            "attention_bias": False,
            "mlp_bias": False,
        },
        neutral=NO_BIAS,
    ),
    tensors=Tensors(BLOCK | QKV_BIAS | DENSE_FFN),
    attention=Attention(rotary="interleaved"),
)

VENDOR = Vendor(
    dense=(HELIUM,),
)
