"""Families of vendors with one row."""

from __future__ import annotations

from dataclasses import replace

from moeconv.families.model import Model
from moeconv.families.rope import rotating
from moeconv.quantize.gguf.llama_cpp.changes import LLAMA_ROTARY
from moeconv.quantize.gguf.llama_cpp.names import NORM_BIAS, O_BIAS, QKV_BIAS, layer
from moeconv.quantize.gguf.llama_cpp.numbers import always
from moeconv.quantize.gguf.llama_cpp.record import LlamaCpp, Number
from moeconv.quantize.gguf.llama_cpp.rows.llama import LLAMA

_LAYER_NORM: dict[str, Number] = {
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "attention.layer_norm_rms_epsilon": always(None),
}


def _every_fourth(model: Model) -> str | None:
    """llama.cpp's smollm3 rotates all layers but every fourth."""
    wanted = [(at + 1) % 4 != 0 for at in range(model.num_layers)]
    return None if rotating(model.value, model.num_layers) == wanted else "these layers without a rotary embedding"


ROWS = {
    "internlm3": replace(LLAMA, names=QKV_BIAS | O_BIAS),
    "seed_oss": LlamaCpp("seed_oss", names=QKV_BIAS | layer({"norm.ffn": "post_attention_norm.weight"}),
                         needs={"attention_out_bias": (False,), "mlp_bias": (False,)}),
    "glm": LlamaCpp("chatglm", names=QKV_BIAS | layer({"ffn.gate_up": "ffn_up.weight"})),
    "smollm3": LlamaCpp("smollm3", changes=LLAMA_ROTARY, checks=(_every_fourth,),
                        needs={"attention_bias": (False,), "mlp_bias": (False,)}),
    "stablelm": LlamaCpp(
        "stablelm",
        names=QKV_BIAS | NORM_BIAS,
        needs={"use_parallel_residual": (False,), "qk_layernorm": (False,)},
        numbers=_LAYER_NORM | {"use_parallel_residual": "use_parallel_residual"},
    ),
    "dbrx": LlamaCpp(
        "dbrx",
        names=layer({"norm.ffn": "attn_output_norm.weight"}),
        numbers={
            "attention.layer_norm_epsilon": always(1e-5),
            "attention.layer_norm_rms_epsilon": always(None),
            "attention.clamp_kqv": "clip_qkv",
        },
    ),
}  # fmt: skip
