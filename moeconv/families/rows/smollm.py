"""Hugging Face: SmolLM3."""

from __future__ import annotations

from moeconv.families import sliding
from moeconv.families.blocks import ATTENTION_BIAS, BLOCK, DENSE_FFN, FFN_BIAS, NO_BIAS, dense_row
from moeconv.families.records import Attention, ConfigKeys, Tensors
from moeconv.families.vendor import Vendor

SMOLLM3 = dense_row(
    "smollm3",
    "SmolLM3ForCausalLM",
    config=ConfigKeys(
        {
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": None,
            "layer_types": None,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
            "attention_bias": False,
            "mlp_bias": False,
            "pretraining_tp": 1,
        },
        neutral=NO_BIAS | {"pretraining_tp": (1, 2, None)},
    ),
    tensors=Tensors(BLOCK | ATTENTION_BIAS | DENSE_FFN | FFN_BIAS),
    attention=Attention(sliding=sliding.SWITCHED_TYPES, rope="no_rope"),
)

VENDOR = Vendor(
    dense=(SMOLLM3,),
)
