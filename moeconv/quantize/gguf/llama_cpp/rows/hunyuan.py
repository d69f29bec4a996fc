"""Tencent: Hunyuan and HY V3."""

from __future__ import annotations

from typing import Any

from moeconv.families.model import Model
from moeconv.families.shapes import head_dim
from moeconv.quantize.gguf.llama_cpp.names import layer
from moeconv.quantize.gguf.llama_cpp.numbers import SIGMOID, always, leading_dense
from moeconv.quantize.gguf.llama_cpp.record import LlamaCpp, Number
from moeconv.quantize.gguf.llama_cpp.rope import rope_of

_NAMES = layer({f"attention.{p}_norm_after_rope": f"attn_{p}_norm.weight" for p in "qk"})


def _theta(model: Model) -> float:
    """The base of rotary embeddings; of type dynamic it is scaled by alpha, whatever the length of the text."""
    rope, size = rope_of(model), head_dim(model.value)
    scaled: float = rope["rope_theta"]
    if rope["rope_type"] == "dynamic":
        scaled *= rope["alpha"] ** (size / (size - 2))
    return float(scaled)


def _scaled(value: Any) -> Number:
    """A value for models with scaled rotary embeddings alone."""
    return lambda model: value if rope_of(model)["rope_type"] == "dynamic" else None


def _needs_alpha(model: Model) -> str | None:
    rope = rope_of(model)
    scaled = rope["rope_type"] != "dynamic" or rope.get("alpha")
    return None if scaled else "rotary embeddings of type dynamic without alpha"


_NUMBERS: dict[str, Number] = {
    "rope.freq_base": _theta,
    "rope.scaling.type": _scaled("none"),
    "rope.scaling.factor": _scaled(1.0),
}
_ROTARY = frozenset({"default", "dynamic"})

ROWS = {
    "hunyuan_v1_dense": LlamaCpp(
        "hunyuan-dense",
        names=_NAMES,
        needs={"attention_bias": (False,), "mlp_bias": (False,)},
        checks=(_needs_alpha,),
        numbers=_NUMBERS,
        rope=_ROTARY,
    ),
    "hunyuan_v1_moe": LlamaCpp(
        "hunyuan-moe",
        names=_NAMES,
        needs={"attention_bias": (False,)},
        checks=(_needs_alpha,),
        numbers=_NUMBERS
        | {
            "expert_feed_forward_length": "intermediate_size",
            "expert_shared_feed_forward_length": "intermediate_size",
            "expert_shared_count": always(1),
        },
        rope=_ROTARY,
    ),
    "hy_v3": LlamaCpp(
        "hy_v3",
        names=layer({"router.correction": "exp_probs_b"}),
        numbers={
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_feed_forward_length": lambda model: model.shared_width,
            "expert_weights_norm": lambda model: model.renormalises,
            "expert_weights_scale": "router_scaling_factor",
            "expert_gating_func": always(SIGMOID),
            "leading_dense_block_count": leading_dense,
        },
        dense_layers="first",
    ),
}
