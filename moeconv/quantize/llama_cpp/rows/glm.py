"""Z.ai: GLM-4.5."""

from __future__ import annotations

from moeconv.quantize.llama_cpp.names import QKV_BIAS, layer
from moeconv.quantize.llama_cpp.record import LlamaCpp
from moeconv.quantize.llama_cpp.rows.dots import DEEPSEEK_NUMBERS, NO_GROUPS, SIGMOID_SCORES

ROWS = {
    "glm4_moe": LlamaCpp(
        "glm4moe",
        names=QKV_BIAS | layer({"norm.ffn": "post_attention_norm.weight"}),
        needs=NO_GROUPS,
        numbers=DEEPSEEK_NUMBERS | SIGMOID_SCORES,
        dense_layers="first",
    ),
}
