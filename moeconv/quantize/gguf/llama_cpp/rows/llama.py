"""Meta: Llama; and the families with its block."""

from __future__ import annotations

from collections.abc import Iterator

from moeconv.families.model import Model
from moeconv.families.rope import rotating
from moeconv.quantize.gguf.llama_cpp.changes import LLAMA_ROTARY
from moeconv.quantize.gguf.llama_cpp.names import FFN_BIAS, O_BIAS, QKV_BIAS
from moeconv.quantize.gguf.llama_cpp.numbers import rotary_factors
from moeconv.quantize.gguf.llama_cpp.record import Constant, LlamaCpp
from moeconv.quantize.gguf.llama_cpp.rope import rope_of

ROTARY = frozenset({"default", "linear", "llama3", "yarn"})


def frequencies(model: Model) -> Iterator[Constant]:
    """The factors of llama3's scaling, which llama.cpp reads as a tensor."""
    if rope_of(model)["rope_type"] == "llama3":
        yield Constant("rope_freqs.weight", tuple(rotary_factors(model)))


LLAMA = LlamaCpp(
    "llama",
    names=QKV_BIAS | O_BIAS | FFN_BIAS,
    changes=LLAMA_ROTARY,
    constants=frequencies,
    rope=ROTARY,
)

_CHUNK, _STEP = 8192, 4


def _llama4_settings(model: Model) -> str | None:
    """The settings that are constants in llama.cpp's code, except for models with 128 experts."""
    config = model.config
    if model.value("attention_chunk_size") != _CHUNK:
        return f"chunks of attention other than {_CHUNK} tokens"
    if rotating(model.value, model.num_layers) != [(at + 1) % _STEP != 0 for at in range(model.num_layers)]:
        return f"layers without a rotary embedding other than every {_STEP}th"
    if bool(config.get("use_qk_norm", True)) != (model.num_experts != 128):
        return "this use_qk_norm"
    usual = {"attn_temperature_tuning": True, "floor_scale": _CHUNK, "attn_scale": 0.1}
    tuned = all(config.get(key, value) == value for key, value in usual.items())
    return None if tuned else "this scaling of attention by the position (floor_scale)"


def _every_layer(model: Model) -> str | None:
    step = model.value("interleave_moe_layer_step")
    wanted = tuple(range(step - 1, model.num_layers, step)) if step else ()
    return None if model.moe_layers == wanted else "these layers with experts (moe_layers)"


LLAMA4 = LlamaCpp(
    "llama4",
    constants=frequencies,
    needs={"attention_bias": (False,)},
    checks=(_llama4_settings, _every_layer),
    numbers={
        "expert_feed_forward_length": "intermediate_size",
        "feed_forward_length": "intermediate_size_mlp",
        "interleave_moe_layer_step": "interleave_moe_layer_step",
    },
    rope=frozenset({"default", "llama3"}),
    dense_layers="any",
)

ROWS = {
    "llama4_text": LLAMA4,
    "llama": LLAMA,
    "mistral": LLAMA,
    "ministral": LLAMA,
    "iquestcoder": LLAMA,
}
