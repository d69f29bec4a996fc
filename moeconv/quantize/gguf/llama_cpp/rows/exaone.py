"""LG AI Research: K-EXAONE."""

from __future__ import annotations

from moeconv.quantize.gguf.llama_cpp.numbers import leading_dense, window, window_pattern
from moeconv.quantize.gguf.llama_cpp.record import LlamaCpp
from moeconv.quantize.gguf.llama_cpp.rows.dots import DEEPSEEK_NUMBERS, SIGMOID_SCORES

ROWS = {
    "exaone_moe": LlamaCpp(
        "exaone-moe",
        numbers=DEEPSEEK_NUMBERS
        | SIGMOID_SCORES
        | {
            "expert_shared_count": "num_shared_experts",
            "expert_shared_feed_forward_length": lambda model: model.shared_width,
            "leading_dense_block_count": leading_dense,
            "attention.sliding_window": window,
            "attention.sliding_window_pattern": window_pattern,
            "rope.scaling.type": lambda _model: "none",
        },
        rope=frozenset({"default"}),
        sliding=frozenset({"mixed", "all"}),
        dense_layers="first",
    ),
}
