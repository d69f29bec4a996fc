"""The record of a layout of compressed-tensors: its schemes, its tensors, and its part of quantization_config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.plan.plan import Item
from moeconv.quantize.spec import Kernel, Scheme, SchemeInfo
from moeconv.types import JsonObject

LOADS = {"transformers": "dequantized", "vllm": "ok", "sglang": "ok", "llama.cpp": "no"}
# for layouts that transformers refuses or reads wrongly, as measured
NOT_LOADED = {"transformers": "no", "vllm": "unknown", "sglang": "unknown", "llama.cpp": "no"}
NOT_RUN = NOT_LOADED | {"transformers": "dequantized"}


@dataclass(frozen=True, slots=True)
class CompressedLayout:
    """`name` is the value of `format` in config.json. `kernel` packs all its `schemes`, so that these need not name it.
    `make` plans one weight, as in `spec.Format`. `weights` and `activations` are those of the scheme's config group;
    None stands for activations that stay as they are."""

    name: str
    schemes: tuple[SchemeInfo, ...]
    kernel: Kernel
    make: Callable[[TensorRef, Scheme, str], Item]
    weights: Callable[[Scheme], JsonObject]
    activations: Callable[[Scheme], JsonObject | None] = lambda _: None
    check: Callable[[TensorRef, Scheme], None] = lambda *_: None  # raises InputError for what cannot be packed


def numbers(bits: int, type: str, strategy: str, **others: object) -> JsonObject:
    """QuantizationArgs of compressed-tensors, for weights or activations; `others` differ from its defaults."""
    return {
        "num_bits": bits, "type": type, "symmetric": True, "strategy": strategy, "group_size": None, "dynamic": False,
        "actorder": None, "block_structure": None, "observer": None, "observer_kwargs": {}, "scale_dtype": None,
        "zp_dtype": None,
    } | others  # fmt: skip


def float_scale(ref: TensorRef) -> str:
    """The dtype of scales that have the dtype of the weight."""
    return ref.dtype if ref.dtype in ("F16", "F32") else "BF16"
