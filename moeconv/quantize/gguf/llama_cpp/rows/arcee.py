"""Arcee AI: AFM and Trinity (afmoe)."""

from __future__ import annotations

from moeconv.families.model import Model
from moeconv.quantize.gguf.llama_cpp.changes import LLAMA_ROTARY
from moeconv.quantize.gguf.llama_cpp.names import POST_NORMS, layer
from moeconv.quantize.gguf.llama_cpp.numbers import SIGMOID, always, leading_dense, window, window_pattern
from moeconv.quantize.gguf.llama_cpp.record import LlamaCpp
from moeconv.quantize.gguf.llama_cpp.rows.llama import ROTARY, frequencies


def _every_fourth(model: Model) -> str | None:
    """llama.cpp rotates all layers but every fourth, whatever their windows."""
    wanted = tuple((at + 1) % 4 != 0 for at in range(model.num_layers))
    return None if model.sliding.layers == wanted else "layers without a window other than every 4th"


ROWS = {
    "arcee": LlamaCpp(
        "arcee", changes=LLAMA_ROTARY, constants=frequencies, activations=("relu2",), rope=ROTARY,
        needs={"attention_bias": (False,), "mlp_bias": (False,)},
    ),
    "afmoe": LlamaCpp(
        "afmoe",
        names=POST_NORMS | layer({"attention.gate": "attn_gate.weight"}),
        needs={"attention_bias": (False,), "mup_enabled": (True,)},
        checks=(_every_fourth,),
        numbers={
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_count": "num_shared_experts",
            "leading_dense_block_count": leading_dense,
            "expert_weights_scale": "route_scale",
            "expert_weights_norm": always(True),
            "expert_gating_func": always(SIGMOID),
            "attention.sliding_window": window,
            "attention.sliding_window_pattern": window_pattern,
        },
        sliding=frozenset({"mixed", "all"}),
        dense_layers="first",
    ),
}  # fmt: skip
