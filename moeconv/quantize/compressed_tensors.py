"""compressed-tensors, pack-quantized, symmetric: what transformers, vLLM and SGLang all load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moeconv.checkpoint.reader import TensorRef
from moeconv.plan.plan import Item
from moeconv.quantize.spec import Format, Scheme, codes


def _make_packed(ref: TensorRef, scheme: Scheme, role: str) -> Item:
    out, width = ref.shape
    scale = "BF16" if ref.dtype not in ("F16", "F32") else ref.dtype
    parts = [
        (".weight_packed", "weight_packed", "I32", (out, width * scheme.bits // 32)),
        (".weight_scale", "weight_scale", scale, (out, width // (scheme.group or width))),
        (".weight_shape", "weight_shape", "I64", (2,)),
    ]
    return codes(ref, "pack_int", parts, role, bits=scheme.bits, group_size=scheme.group)


def _packed_config(scheme: Scheme, ignore: Sequence[str], _dtype: str, _scope: str) -> dict[str, Any]:
    weights = {
        "num_bits": scheme.bits, "type": "int", "symmetric": True, "strategy": "group" if scheme.group else "channel",
        "group_size": scheme.group, "dynamic": False, "actorder": None, "block_structure": None, "observer": "minmax",
        "observer_kwargs": {},
    }  # fmt: skip
    # targets [Linear] with ignore, not regular expressions: SGLang builds names with gate, up and down hard-coded
    group = {
        "targets": ["Linear"], "format": "pack-quantized", "weights": weights, "input_activations": None,
        "output_activations": None,
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


_LOADS = {"transformers": "dequantized", "vllm": "ok", "sglang": "ok", "llama.cpp": "no"}
_NOTES = {
    "transformers": "expands to the dtype of the scales in memory",
    "vllm": "int4 on CPU and GPU; int8 on a GPU (read in its source), its CPU backend has no kernel",
    "sglang": "read in its source, not run",
}

COMPRESSED_TENSORS = Format(
    "compressed-tensors",
    ("int4", "int8"),
    grouped=True,
    make=_make_packed,
    config=_packed_config,
    loads={"int4": _LOADS, "int8": _LOADS | {"vllm": "unknown"}},  # refused by its CPU backend, measured
    mixed=_LOADS | {"transformers": "no"},
    notes=_NOTES,
)
