"""Ai2: OLMo and OLMoE."""

from __future__ import annotations

from dataclasses import replace

from moeconv.families.model import Model
from moeconv.quantize.gguf.llama_cpp.changes import LLAMA_ROTARY
from moeconv.quantize.gguf.llama_cpp.names import layer
from moeconv.quantize.gguf.llama_cpp.numbers import always, window, window_pattern
from moeconv.quantize.gguf.llama_cpp.record import LlamaCpp

OLMO2 = LlamaCpp(
    "olmo2",
    names=layer({"norm.attention": "post_attention_norm.weight", "norm.ffn": "post_ffw_norm.weight"}),
    needs={"attention_bias": (False,)},
    grouped_query=False,
)


def _clip(model: Model) -> float | None:
    found: float | None = model.value("clip_qkv")
    return found


ROWS = {
    "olmo": LlamaCpp(
        "olmo",
        changes=LLAMA_ROTARY,
        needs={"attention_bias": (False,)},
        numbers={
            "attention.layer_norm_epsilon": always(1e-5),
            "attention.layer_norm_rms_epsilon": always(None),
            "attention.clamp_kqv": _clip,
        },
    ),
    "olmo2": replace(OLMO2, grouped_query=True),
    "olmo3": replace(
        OLMO2,
        grouped_query=True,
        numbers={"attention.sliding_window": window, "attention.sliding_window_pattern": window_pattern},
        sliding=frozenset({"none", "mixed", "all"}),
        rope=frozenset({"default"}),
    ),
    "olmoe": LlamaCpp(
        "olmoe",
        needs={"norm_topk_prob": (False,), "clip_qkv": (None,), "attention_bias": (False,)},
        grouped_query=False,
    ),
}
