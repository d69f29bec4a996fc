"""Liquid AI: LFM2."""

from __future__ import annotations

from dataclasses import replace

from moeconv.quantize.gguf.llama_cpp.changes import without_middle_axis
from moeconv.quantize.gguf.llama_cpp.mamba import heads_of_attention
from moeconv.quantize.gguf.llama_cpp.names import layer
from moeconv.quantize.gguf.llama_cpp.numbers import SIGMOID, always, leading_dense
from moeconv.quantize.gguf.llama_cpp.record import LlamaCpp

LFM2 = LlamaCpp(
    "lfm2",
    names={"norm.final": "token_embd_norm.weight"}
    | layer(
        {
            "conv.kernel": "shortconv.conv.weight",
            "conv.in": "shortconv.in_proj.weight",
            "conv.out": "shortconv.out_proj.weight",
        }
    ),
    changes={"conv.kernel": without_middle_axis},
    needs={"conv_bias": (False,)},
    numbers={
        "attention.head_count_kv": heads_of_attention,
        "attention.layer_norm_rms_epsilon": "norm_eps",
        "feed_forward_length": lambda model: model.ffn_width,
        "shortconv.l_cache": "conv_L_cache",
    },
)

ROWS = {
    "lfm2": LFM2,
    "lfm2_moe": replace(
        LFM2,
        arch="lfm2moe",
        needs={"conv_bias": (False,), "norm_topk_prob": (True,), "routed_scaling_factor": (1.0,),
               "use_expert_bias": (True,)},
        numbers={
            **LFM2.numbers,
            "expert_feed_forward_length": "moe_intermediate_size",
            "leading_dense_block_count": leading_dense,
            "expert_gating_func": always(SIGMOID),
        },
        dense_layers="first",
    ),
}  # fmt: skip
