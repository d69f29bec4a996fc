"""Z.ai: GLM-4.5; Upstage: Solar Open, with its block."""

from __future__ import annotations

from dataclasses import replace

from moeconv.quantize.gguf.llama_cpp.names import QKV_BIAS, layer
from moeconv.quantize.gguf.llama_cpp.numbers import leading_dense
from moeconv.quantize.gguf.llama_cpp.record import LlamaCpp
from moeconv.quantize.gguf.llama_cpp.rows.dots import DEEPSEEK_NUMBERS, SIGMOID_SCORES

GLM4_MOE = LlamaCpp(
    "glm4moe",
    names=QKV_BIAS | layer({"norm.ffn": "post_attention_norm.weight"}),
    numbers=DEEPSEEK_NUMBERS | SIGMOID_SCORES,
    dense_layers="first",
)

ROWS = {
    "glm4_moe": GLM4_MOE,
    "solar_open": replace(GLM4_MOE, numbers={**GLM4_MOE.numbers, "leading_dense_block_count": leading_dense}),
}
