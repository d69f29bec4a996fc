"""Alibaba: Qwen2, Qwen3 and their Mixtures-of-Experts."""

from __future__ import annotations

from moeconv.quantize.gguf.llama_cpp.names import QKV_BIAS
from moeconv.quantize.gguf.llama_cpp.record import LlamaCpp

ROTARY = frozenset({"default", "linear", "yarn"})
_EVERY_LAYER: dict[str, tuple[object, ...]] = {"mlp_only_layers": ([], None), "decoder_sparse_step": (1,)}

ROWS = {
    "qwen2": LlamaCpp("qwen2", names=QKV_BIAS, rope=ROTARY),
    "qwen3": LlamaCpp("qwen3", needs={"attention_bias": (False,)}, rope=ROTARY),
    "qwen2_moe": LlamaCpp(
        "qwen2moe",
        names=QKV_BIAS,
        needs={**_EVERY_LAYER, "norm_topk_prob": (False,)},
        numbers={
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        },
        rope=ROTARY,
    ),
    "qwen3_moe": LlamaCpp(
        "qwen3moe",
        needs={**_EVERY_LAYER, "norm_topk_prob": (True,), "attention_bias": (False,)},
        numbers={"expert_feed_forward_length": "moe_intermediate_size"},
        rope=ROTARY,
    ),
}
