"""The hyperparameters in a GGUF file, by llama.cpp's keys without the architecture in front."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from moeconv.families.model import Model
from moeconv.families.shapes import head_dim
from moeconv.quantize.gguf.llama_cpp.record import LlamaCpp, Number, Value
from moeconv.quantize.gguf.llama_cpp.rope import rope_of

# llama_expert_gating_func_type of llama.cpp
SOFTMAX, SIGMOID = 1, 2
# the keys whose values are floats, whatever type config.json has
_FLOATS = (
    "epsilon", "_scale", "_scaling", "freq_base", "freq_base_swa", "factor", "softcapping", "attention.scale",
    "beta_fast", "beta_slow", "log_multiplier", "clamp_exp", "clamp_shexp", "temperature_scale", "clamp_kqv",
)  # fmt: skip


def usual(model: Model) -> dict[str, Value | None]:
    """The keys that llama.cpp reads for most families."""
    value = model.value
    heads, width = value("num_attention_heads"), head_dim(value)
    found: dict[str, Value | None] = {
        "block_count": model.num_layers,
        "context_length": value("max_position_embeddings"),
        "embedding_length": model.hidden_size,
        "feed_forward_length": value("intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": value("num_key_value_heads") or heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": value("rms_norm_eps"),
        "rope.dimension_count": int(width * float(_partial(model))),
        "vocab_size": value("vocab_size"),
    }
    if model.num_experts:
        found |= {"expert_count": model.num_experts, "expert_used_count": model.top_k}
    return found | _rotary(model)


def _partial(model: Model) -> Any:
    return rope_of(model).get("partial_rotary_factor") or 1.0


def _rotary(model: Model) -> dict[str, Value | None]:
    rope = rope_of(model)
    found: dict[str, Value | None] = {"rope.freq_base": rope["rope_theta"]}
    match rope["rope_type"]:
        case "linear":
            found |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
        case "longrope":
            found |= {"rope.scaling.type": "longrope"}
        case "yarn":
            found |= {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": rope["factor"],
                "rope.scaling.original_context_length": rope.get("original_max_position_embeddings")
                or model.value("max_position_embeddings"),
                "rope.scaling.yarn_attn_factor": rope.get("attention_factor"),
                "rope.scaling.yarn_beta_fast": rope.get("beta_fast"),
                "rope.scaling.yarn_beta_slow": rope.get("beta_slow"),
            }
    return found


def hyperparameters(model: Model, row: LlamaCpp) -> dict[str, Value]:
    """All keys of a model, with values of the type that the file has."""
    found = usual(model)
    for key, number in row.numbers.items():
        found[key] = _read(model, number)
    return {key: _typed(key, value) for key, value in found.items() if value is not None}


def _read(model: Model, number: Number) -> Value | None:
    if isinstance(number, str):
        found: Value | None = model.value(number)
        return found
    return number(model)


def _typed(key: str, value: Value) -> Value:
    if not key.endswith(_FLOATS) or isinstance(value, str):
        return value
    return [float(x) for x in value] if isinstance(value, list) else float(value)


# -- values that several rows have -------------------------------------------------------------------------------------


def always(value: Value | None) -> Callable[[Model], Value | None]:
    """The same value for every model; None leaves the key out."""
    return lambda _model: value


def leading_dense(model: Model) -> int:
    """The number of layers before the first one with experts."""
    return model.moe_layers[0] if model.moe_layers else model.num_layers


def window(model: Model) -> int | None:
    """The length of the sliding window; None without one."""
    return model.sliding.window


def window_pattern(model: Model) -> list[bool] | None:
    """Whether each layer attends through the window; None where no layer does."""
    return list(model.sliding.layers) if any(model.sliding.layers) else None


def rotary_factors(model: Model) -> list[float]:
    """What llama3's scaling divides the frequency of each pair of a head by (transformers'
    `_compute_llama3_parameters`)."""
    rope = rope_of(model)
    size, theta = head_dim(model.value), float(rope["rope_theta"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    factor, length = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    found = []
    for pair in range(0, size, 2):
        wavelength = 2 * math.pi * theta ** (pair / size)
        smooth = (length / wavelength - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth) if high != low else 1.0
        found.append(1.0 if wavelength < length / high else factor if wavelength > length / low else between)
    return found
