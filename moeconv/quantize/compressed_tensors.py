"""compressed-tensors: one format with several layouts, each with its own schemes and part of quantization_config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.plan.plan import Item
from moeconv.quantize.compressed.eightbit import FLOAT8, FLOAT8_BLOCKS, INTEGER8
from moeconv.quantize.compressed.layout import LOADS, CompressedLayout
from moeconv.quantize.compressed.microscale import MXFP4, MXFP8
from moeconv.quantize.compressed.nvfp4 import NVFP4, NVFP4_A4
from moeconv.quantize.compressed.packed import ASYMMETRIC, PACKED
from moeconv.quantize.layout.planner import served_form
from moeconv.quantize.spec import Format, Scheme
from moeconv.types import JsonObject

LAYOUTS = (PACKED, ASYMMETRIC, FLOAT8, FLOAT8_BLOCKS, INTEGER8, NVFP4, NVFP4_A4, MXFP4, MXFP8)
_BY_SCHEME: Mapping[str, CompressedLayout] = {info.name: layout for layout in LAYOUTS for info in layout.schemes}


def _make(ref: TensorRef, scheme: Scheme, role: str) -> Item:
    return _BY_SCHEME[scheme.name].make(ref, scheme, role)


def _config(scheme: Scheme, ignore: Sequence[str], _dtype: str, _scope: str) -> JsonObject:
    layout = _BY_SCHEME[scheme.name]
    # targets are [Linear] with `ignore` and no regular expressions, since SGLang hard-codes the names gate, up and down
    group = {
        "targets": ["Linear"], "format": layout.name, "weights": layout.weights(scheme),
        "input_activations": layout.activations(scheme), "output_activations": None,
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "format": layout.name,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _by_layer(parts: Mapping[Scheme, JsonObject], schemes: Mapping[int, Scheme]) -> JsonObject:
    """One config group per scheme, with the experts of its layers as targets."""
    used = list(dict.fromkeys(schemes.values()))
    groups = {}
    for i, scheme in enumerate(used):
        layers = "|".join(str(layer) for layer, s in schemes.items() if s == scheme)
        (group,) = parts[scheme]["config_groups"].values()
        groups[f"group_{i}"] = group | {"targets": [rf"re:.*layers\.({layers})\..*experts\..*"]}
    layouts = {parts[scheme]["format"] for scheme in used}
    mixed = {"format": "mixed-precision"} if len(layouts) > 1 else {}
    return parts[min(used, key=lambda s: s.bits)] | {"config_groups": groups} | mixed


def _beside(main: JsonObject, rest: JsonObject, modules: Sequence[str]) -> JsonObject:
    """Two config groups. The experts keep the target Linear, which vLLM looks for where it has fused the experts of a
    layer; regular expressions take precedence over it."""
    (first,), (second,) = main["config_groups"].values(), rest["config_groups"].values()
    layout = main["format"] if main["format"] == rest["format"] else "mixed-precision"
    groups = {"group_0": first, "group_1": second | {"targets": list(modules)}}
    return main | {"format": layout, "config_groups": groups}


_MARLIN = 128  # vLLM's GPU kernel for packed integers wants a hidden size of whole multiples


def _remarks(runtime: str, hidden: int) -> list[str]:
    if runtime != "vllm" or hidden % _MARLIN == 0:
        return []
    return [f"vLLM's fast GPU kernel needs a hidden size of multiples of {_MARLIN}, this one is {hidden}"]


COMPRESSED_TENSORS = Format(
    "compressed-tensors",
    tuple(replace(info, kernel=layout.kernel.name) for layout in LAYOUTS for info in layout.schemes),
    notes={
        "transformers": "expands to the dtype of the scales in memory; silently ignores the second scale of nvfp4",
        "vllm": "its CPU backend has kernels for w8a8, and for int4 with plain softmax routers; not run on a GPU",
        "sglang": "according to its source, not run",
    },
    kernels=tuple({layout.kernel.name: layout.kernel for layout in LAYOUTS}.values()),
    make=_make,
    config=_config,
    form=served_form,
    check=lambda ref, scheme: _BY_SCHEME[scheme.name].check(ref, scheme),
    mixes=("int2", "int3", "int4", "int8"),
    among=("int4-asym", "nvfp4", "mxfp4", "fp8", "mxfp8", "w8a8"),
    mixed=LOADS | {"transformers": "no"},
    merge=_by_layer,
    beside=_beside,
    # vLLM was run with int4 and w8a8 experts beside w8a8 attention
    beside_loads={"transformers": "dequantized", "vllm": "ok", "llama.cpp": "no"},
    remarks=_remarks,
)
