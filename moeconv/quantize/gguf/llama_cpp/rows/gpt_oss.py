"""OpenAI: gpt-oss."""

from __future__ import annotations

from moeconv.quantize.gguf.llama_cpp.names import O_BIAS, QKV_BIAS, layer
from moeconv.quantize.gguf.llama_cpp.numbers import window, window_pattern
from moeconv.quantize.gguf.llama_cpp.record import LlamaCpp

ROWS = {
    "gpt_oss": LlamaCpp(
        "gpt-oss",
        names=QKV_BIAS
        | O_BIAS
        | layer({"attention.sinks": "attn_sinks.weight", "norm.ffn": "post_attention_norm.weight"}),
        needs={"attention_bias": (True,), "swiglu_alpha": (1.702,), "swiglu_limit": (7.0,)},
        numbers={
            "expert_feed_forward_length": "intermediate_size",
            "attention.sliding_window": window,
            "attention.sliding_window_pattern": window_pattern,
        },
        rope=frozenset({"default", "linear", "yarn"}),
        sliding=frozenset({"mixed", "all"}),
    ),
}
