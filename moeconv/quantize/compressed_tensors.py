"""compressed-tensors, pack-quantized, symmetric: the layout that transformers, vLLM and SGLang all load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.errors import InputError, escape
from moeconv.plan.plan import Item
from moeconv.quantize.spec import Format, Kernel, Scheme, SchemeInfo, codes
from moeconv.types import JsonObject


def _make_packed(ref: TensorRef, scheme: Scheme, role: str) -> Item:
    out, width = ref.shape
    scale = "BF16" if ref.dtype not in ("F16", "F32") else ref.dtype
    parts = [
        (".weight_packed", "weight_packed", "I32", (out, width * scheme.bits // 32)),
        (".weight_scale", "weight_scale", scale, (out, width // (scheme.group or width))),
        (".weight_shape", "weight_shape", "I64", (2,)),
    ]
    return codes(ref, "pack_int", parts, role, bits=scheme.bits, group_size=scheme.group)


def _packed_config(scheme: Scheme, ignore: Sequence[str], _dtype: str, _scope: str) -> JsonObject:
    weights = {
        "num_bits": scheme.bits, "type": "int", "symmetric": True, "strategy": "group" if scheme.group else "channel",
        "group_size": scheme.group, "dynamic": False, "actorder": None, "block_structure": None, "observer": "minmax",
        "observer_kwargs": {},
    }  # fmt: skip
    # targets are [Linear] with `ignore` and no regular expressions, since SGLang hard-codes the names gate, up and down
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


def _check_words(ref: TensorRef, scheme: Scheme) -> None:
    if ref.shape[1] * scheme.bits % 32:
        raise InputError(
            f"tensor {escape(ref.name)!r}: its {ref.shape[1]} columns of {scheme.bits} bits do not fill 32-bit words",
            hint="Use --format bitsandbytes.",
        )


def _by_layer(parts: Mapping[Scheme, JsonObject], schemes: Mapping[int, Scheme]) -> JsonObject:
    """One config group per scheme, with the experts of its layers as targets."""
    used = list(dict.fromkeys(schemes.values()))
    groups = {}
    for i, scheme in enumerate(used):
        layers = "|".join(str(layer) for layer, s in schemes.items() if s == scheme)
        (group,) = parts[scheme]["config_groups"].values()
        groups[f"group_{i}"] = group | {"targets": [rf"re:.*layers\.({layers})\..*experts\..*"]}
    return parts[min(used, key=lambda s: s.bits)] | {"config_groups": groups}


_MARLIN = 128  # vLLM's GPU kernel for packed integers wants a hidden size of whole multiples


def _remarks(runtime: str, hidden: int) -> list[str]:
    if runtime != "vllm" or hidden % _MARLIN == 0:
        return []
    return [f"vLLM's fast GPU kernel needs a hidden size of multiples of {_MARLIN}, this one is {hidden}"]


_LOADS = {"transformers": "dequantized", "vllm": "ok", "sglang": "ok", "llama.cpp": "no"}
# vLLM on a CPU, tests/runtimes/served.py; where it differs, it does so with unpacked weights too
_INT4_IN_VLLM = {
    **dict.fromkeys(
        (
            "mixtral",
            "qwen3_moe",
            "qwen2_moe",
            "olmoe",
            "hunyuan_v1_moe",
            "mellum",
            "granitemoe",
            "granitemoeshared",
            "gemma4_text",
        ),
        "same",
    ),
    **dict.fromkeys(("cohere2_moe", "phimoe"), "differs"),
    **dict.fromkeys(
        (
            "glm4_moe",
            "dots1",
            "ernie4_5_moe",
            "minimax_m2",
            "deepseek_v3",
            "hy_v3",
            "exaone_moe",
            "afmoe",
            "solar_open",
            "glm4_moe_lite",
            "lfm2_moe",
            "mimo_v2_flash",
        ),
        "refused",
    ),
}
_INT8_IN_VLLM = dict.fromkeys(_INT4_IN_VLLM, "refused")

COMPRESSED_TENSORS = Format(
    "compressed-tensors",
    (
        SchemeInfo(
            "int4", 4, "I32", _LOADS, limit=0.4, aliases=("w4a16",), groups=(128, 64, 32),
            errors={32: 0.0946**2, 64: 0.1031**2, 128: 0.1108**2},
            measured={"transformers": {}, "vllm": _INT4_IN_VLLM},
        ),
        SchemeInfo(
            "int8", 8, "I32", _LOADS | {"vllm": "unknown"},  # refused by its CPU backend, measured
            limit=0.05, aliases=("w8a16",), groups=(128, 64, 32, None),
            errors={32: 0.0055**2, 64: 0.0060**2, 128: 0.0065**2, None: 0.0091**2},
            measured={"transformers": {}, "vllm": _INT8_IN_VLLM},
        ),
    ),
    notes={
        "transformers": "expands to the dtype of the scales in memory",
        "vllm": "its CPU backend refuses int8, and int4 where routers are not a softmax alone; on a GPU not run",
        "sglang": "from its source, not run",
    },
    kernels=(Kernel("pack_int", fits=True, grid="moeconv.quantize.gptq.grids:INTEGER"),),
    make=_make_packed,
    config=_packed_config,
    apart=True,
    check=_check_words,
    mixes=("int4", "int8"),
    mixed=_LOADS | {"transformers": "no"},
    merge=_by_layer,
    remarks=_remarks,
)  # fmt: skip
