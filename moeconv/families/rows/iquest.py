"""IQuest: IQuest-Coder."""

from __future__ import annotations

from moeconv.families.blocks import ATTENTION_BIAS, BLOCK, DENSE_FFN, FFN_BIAS, NO_BIAS, dense_row
from moeconv.families.records import ConfigKeys, Tensors
from moeconv.families.vendor import Vendor

IQUESTCODER = dense_row(
    "iquestcoder",
    "IQuestCoderForCausalLM",
    config=ConfigKeys(
        {
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
            "attention_bias": False,
            "mlp_bias": False,
        },
        neutral=NO_BIAS,
    ),
    tensors=Tensors(BLOCK | ATTENTION_BIAS | DENSE_FFN | FFN_BIAS),
)

VENDOR = Vendor(
    dense=(IQUESTCODER,),
)
