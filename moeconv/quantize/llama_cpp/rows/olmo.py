"""Ai2: OLMoE."""

from __future__ import annotations

from moeconv.quantize.llama_cpp.record import LlamaCpp

ROWS = {
    "olmoe": LlamaCpp(
        "olmoe",
        needs={"norm_topk_prob": (False,), "clip_qkv": (None,), "attention_bias": (False,)},
        grouped_query=False,
    ),
}
