"""How a quantized weight is spread over several tensors on disk: the suffixes that replace `.weight`.

A packed weight is the tensor that transformers would call X.weight, stored as X + one suffix per part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# suffix that takes the place of ".weight" -> name of the part. The first two carry the codes.
PARTS: dict[str, str] = {
    ".weight_packed": "packed",
    ".weight": "weight",
    ".weight_scale": "scale",
    ".weight_scale_inv": "scale_inv",  # DeepSeek's FP8: a scale for every block of 128 x 128
    ".input_scale": "input_scale",  # of activations; no part of the weight's value
    ".weight_shape": "shape",
    ".weight.absmax": "absmax",
    ".weight.quant_map": "quant_map",
    ".weight.nested_absmax": "nested_absmax",
    ".weight.nested_quant_map": "nested_quant_map",
    ".weight.quant_state.bitsandbytes__nf4": "state",
    ".weight.quant_state.bitsandbytes__fp4": "state",
    ".SCB": "SCB",
}
# suffixes behind the name of a tensor without ".weight": MXFP4 codes and exponents of all experts
STACKED_PARTS: dict[str, str] = {"_blocks": "blocks", "_scales": "exponents"}
_BY_LENGTH = sorted(PARTS, key=len, reverse=True)


def split_part(name: str) -> tuple[str, str] | None:
    """(name of the weight that this tensor is a part of, part), or None for a tensor that is no part of one."""
    for suffix in _BY_LENGTH:
        if name.endswith(suffix):
            return name[: -len(suffix)] + ".weight", PARTS[suffix]
    for suffix, part in STACKED_PARTS.items():
        if name.endswith(suffix):
            return name[: -len(suffix)], part
    return None


def suffix_of(name: str) -> str:
    """What a stored tensor's name has behind the stem of its weight: the keys of `tensors.read_parts`."""
    split = split_part(name)
    return "" if split is None else name.removeprefix(split[0].removesuffix(".weight"))


def quantization(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization_config of a config.json, or None."""
    value = config.get("quantization_config")
    return dict(value) if isinstance(value, dict) else None


_BITS = {"fp8": 8, "mxfp4": 4}


def bits_of(config: Mapping[str, Any]) -> int | None:
    """Bits per packed element that a quantization_config states, or None when it does not say."""
    value = quantization(config)
    if value is None:
        return None
    if value.get("quant_method") in _BITS:
        return _BITS[value["quant_method"]]
    if value.get("load_in_4bit") or value.get("load_in_8bit"):
        return 4 if value.get("load_in_4bit") else 8
    groups = value.get("config_groups")
    if isinstance(groups, dict):
        for group in groups.values():
            weights = group.get("weights") if isinstance(group, dict) else None
            if isinstance(weights, dict) and isinstance(weights.get("num_bits"), int):
                return weights["num_bits"]
    return value.get("bits") if isinstance(value.get("bits"), int) else None
