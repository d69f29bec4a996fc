"""Inception: Jais 2."""

from __future__ import annotations

from moeconv.families.blocks import ATTENTION_BIAS, BLOCK, NO_BIAS, NORM_BIAS, UNGATED_FFN, dense_row
from moeconv.families.records import ConfigKeys, Tensors
from moeconv.families.vendor import Vendor

JAIS2 = dense_row(
    "jais2",
    "Jais2ForCausalLM",
    config=ConfigKeys(
        {
            "layer_norm_eps": 1e-5,
            "hidden_act": "relu2",
            "max_position_embeddings": 8192,
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": None,
        },
        neutral=NO_BIAS,
    ),
    tensors=Tensors(BLOCK | NORM_BIAS | ATTENTION_BIAS | UNGATED_FFN),
)

VENDOR = Vendor(
    dense=(JAIS2,),
)
