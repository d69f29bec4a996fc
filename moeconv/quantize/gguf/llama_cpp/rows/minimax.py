"""MiniMax: M2."""

from __future__ import annotations

from moeconv.quantize.gguf.llama_cpp.numbers import SIGMOID, always
from moeconv.quantize.gguf.llama_cpp.record import LlamaCpp
from moeconv.quantize.gguf.llama_cpp.rope import rope_of

ROWS = {
    "minimax_m2": LlamaCpp(
        "minimax-m2",
        numbers={
            "expert_feed_forward_length": "intermediate_size",
            "expert_gating_func": always(SIGMOID),
            "rope.dimension_count": lambda model: int(
                model.value("head_dim") * (rope_of(model).get("partial_rotary_factor") or 1.0)
            ),
        },
    ),
}
