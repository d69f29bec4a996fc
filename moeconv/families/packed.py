"""How a quantized weight is spread over several tensors on disk: the suffixes that replace `.weight`.

A packed weight is the tensor that transformers would call X.weight, stored as X + one suffix per part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moeconv.checkpoint.reader import TensorRef

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
# suffixes behind the whole name of a tensor of all experts: MXFP4 codes and exponents, and what lies beside codes that
# have the tensor's own name (the first axis counts experts, but in SHARED ones)
STACKED_PARTS: dict[str, str] = {
    "_blocks": "blocks",
    "_scales": "exponents",
    ".absmax": "absmax",
    ".quant_map": "quant_map",
    ".quant_state": "state",
    ".nested_absmax": "nested_absmax",
    ".nested_quant_map": "nested_quant_map",
    ".nested_offset": "nested_offset",
    ".scb": "SCB",
}
STACKED = ("_blocks", "_scales", ".quant_state", ".scb")  # one is there wherever codes are of all experts
SHARED = ("quant_map", "nested_quant_map", "state")
CODES = ("U8", "I8")
_BY_LENGTH = sorted(PARTS, key=len, reverse=True)
_STACKED_BY_LENGTH = sorted(STACKED_PARTS, key=len, reverse=True)


def split_part(name: str) -> tuple[str, str] | None:
    """(name of the weight that this tensor is a part of, part), or None for a tensor that is no part of one."""
    for suffix in _BY_LENGTH:
        if name.endswith(suffix):
            return name[: -len(suffix)] + ".weight", PARTS[suffix]
    for suffix in _STACKED_BY_LENGTH:
        if name.endswith(suffix):
            return name[: -len(suffix)], STACKED_PARTS[suffix]
    return None


def weight_of(name: str) -> str:
    """The name of the weight that a stored tensor is a part of."""
    split = split_part(name)
    return split[0] if split else name


def suffix_of(name: str) -> str:
    """What a stored tensor's name has behind the stem of its weight: the keys of `tensors.read_parts`."""
    split = split_part(name)
    return "" if split is None else name.removeprefix(split[0].removesuffix(".weight"))


def elements(ref: TensorRef, part: str, *, bits: int | None) -> int:
    """Parameters that a stored tensor stands for: elements of a plain tensor, or of the codes of a packed weight of
    `bits`; 0 for what only helps to decode. `part` as split_part names it, "" for a plain tensor."""
    count = math.prod(ref.shape)
    if part in ("", "weight") and ref.dtype not in ("U8", "I32"):
        return count
    if part == "blocks":
        return 2 * count
    return ref.nbytes * 8 // (bits or 8) if part in ("packed", "weight") else 0


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
