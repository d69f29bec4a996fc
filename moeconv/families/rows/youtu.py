"""Tencent: Youtu-LLM, with latent attention."""

from __future__ import annotations

from moeconv.families.blocks import DENSE_FFN, MLA, MLA_CONFIG, MLA_OPTIONAL, WITHOUT_QKVO, dense_row
from moeconv.families.records import ConfigKeys, Tensors
from moeconv.families.shapes import LATENT
from moeconv.families.vendor import Vendor

YOUTU = dense_row(
    "youtu",
    "YoutuForCausalLM",
    config=ConfigKeys(
        MLA_CONFIG
        | {"num_key_value_heads": 16, "max_position_embeddings": 131072, "tie_word_embeddings": True}
        | {"initializer_range": None, "rope_interleave": True, "head_dim": "=qk_rope_head_dim"},
        derived={"initializer_range": lambda get: 2 / (5 * get("hidden_size")) ** 0.5},
    ),
    tensors=Tensors(
        WITHOUT_QKVO | MLA | DENSE_FFN,
        optional=MLA_OPTIONAL,
        shapes=LATENT,
    ),
)

VENDOR = Vendor(
    dense=(YOUTU,),
)
