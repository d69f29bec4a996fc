"""ByteDance: Seed-OSS."""

from __future__ import annotations

from moeconv.families.blocks import ATTENTION_BIAS, BLOCK, DENSE_FFN, FFN_BIAS, NO_BIAS, dense_row
from moeconv.families.records import ConfigKeys, Tensors
from moeconv.families.vendor import Vendor

SEED_OSS = dense_row(
    "seed_oss",
    "SeedOssForCausalLM",
    config=ConfigKeys(
        {
            "num_key_value_heads": 8,
            "attention_dropout": 0.1,
            "head_dim": 128,
            "max_position_embeddings": 524288,
            "attention_bias": True,
            "attention_out_bias": False,
            "mlp_bias": False,
            "pretraining_tp": 1,
        },
        neutral=NO_BIAS | {"attention_out_bias": (False,), "pretraining_tp": (1, None)},
    ),
    tensors=Tensors(BLOCK | ATTENTION_BIAS | DENSE_FFN | FFN_BIAS),
)

VENDOR = Vendor(
    dense=(SEED_OSS,),
)
