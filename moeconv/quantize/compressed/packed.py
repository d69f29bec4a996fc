"""compressed-tensors, pack-quantized: integers in 32-bit words, symmetric or with zero points; activations stay as they
are. The symmetric layout is what transformers, vLLM and SGLang all load."""

from __future__ import annotations

from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.errors import InputError, escape
from moeconv.plan.plan import Item
from moeconv.quantize.compressed.layout import LOADS, NOT_LOADED, CompressedLayout, float_scale, numbers
from moeconv.quantize.spec import BY_DATA, GPUS, AsStored, Kernel, Part, Scheme, SchemeInfo, codes
from moeconv.types import JsonObject

_NAME = "pack-quantized"
_SYMMETRIC = {"packed-int": AsStored(("packed", "scale", "shape"))}
_WITH_ZEROS = {"packed-int": AsStored(("packed", "scale", "zero_point", "shape"))}


def _make(ref: TensorRef, scheme: Scheme, role: str) -> Item:
    return codes(ref, "pack_int", _parts(ref, scheme), role, bits=scheme.bits, group_size=scheme.group)


def _parts(ref: TensorRef, scheme: Scheme) -> list[Part]:
    out, width = ref.shape
    return [
        (".weight_packed", "weight_packed", "I32", (out, width * scheme.bits // 32)),
        (".weight_scale", "weight_scale", float_scale(ref), (out, width // (scheme.group or width))),
        (".weight_shape", "weight_shape", "I64", (2,)),
    ]


def _weights(scheme: Scheme) -> JsonObject:
    return {
        "num_bits": scheme.bits, "type": "int", "symmetric": True, "strategy": "group" if scheme.group else "channel",
        "group_size": scheme.group, "dynamic": False, "actorder": None, "block_structure": None, "observer": "minmax",
        "observer_kwargs": {},
    }  # fmt: skip


def _make_asymmetric(ref: TensorRef, scheme: Scheme, role: str) -> Item:
    out, width = ref.shape
    group = scheme.group or width
    packed, scales, shape = _parts(ref, scheme)
    zeros = (".weight_zero_point", "weight_zero_point", "I32", (-(-out // 8), width // group))
    return codes(ref, "pack_int4_asymmetric", [packed, scales, zeros, shape], role, group_size=group)


def _asymmetric_weights(scheme: Scheme) -> JsonObject:
    zeros = {"symmetric": False, "zp_dtype": "torch.int8"}
    return numbers(scheme.bits, "int", "group", group_size=scheme.group, **zeros)


def _check_words(ref: TensorRef, scheme: Scheme) -> None:
    if ref.shape[1] * scheme.bits % 32:
        raise InputError(
            f"tensor {escape(ref.name)!r}: its {ref.shape[1]} columns of {scheme.bits} bits do not fill 32-bit words",
            hint="Use --format bitsandbytes.",
        )


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
# vLLM has a kernel for them on Nvidia GPUs with the package humming, by its source; its CPU backend has none
_NARROW = LOADS | {"vllm": "unknown", "sglang": "unknown"}

PACKED = CompressedLayout(
    _NAME,
    (
        SchemeInfo(
            "int4",
            4,
            "I32",
            LOADS,
            limit=0.4,
            aliases=("w4a16",),
            groups=(128, 64, 32),
            errors={32: 0.0946**2, 64: 0.1031**2, 128: 0.1108**2},
            measured={"transformers": {}, "vllm": _INT4_IN_VLLM},
            hardware=(*GPUS, "cpu"),
            error=0.1108,
        ),
        SchemeInfo(
            "int8",
            8,
            "I32",
            LOADS | {"vllm": "unknown"},  # refused by its CPU backend, measured
            limit=0.05,
            aliases=("w8a16",),
            groups=(128, 64, 32, None),
            errors={32: 0.0055**2, 64: 0.0060**2, 128: 0.0065**2, None: 0.0091**2},
            measured={"transformers": {}, "vllm": _INT8_IN_VLLM},
            hardware=GPUS,
            error=0.0065,
        ),
        SchemeInfo(
            "int2",
            2,
            "I32",
            _NARROW,
            limit=1.2,
            aliases=("w2a16",),
            groups=(128, 64, 32),
            errors={32: 0.4704**2, 64: 0.5094**2, 128: 0.5473**2},
            measured={"transformers": {}},
            hardware=GPUS,
            error=0.5473,
        ),
        SchemeInfo(
            "int3",
            3,
            "I32",
            _NARROW,
            limit=0.6,
            aliases=("w3a16",),
            groups=(128, 64, 32),
            errors={32: 0.2027**2, 64: 0.2198**2, 128: 0.2365**2},
            measured={"transformers": {}},
            hardware=GPUS,
            error=0.2365,
        ),
    ),
    Kernel(
        "pack_int",
        fits=True,
        grid="moeconv.quantize.gptq.grids:INTEGER",
        encodes=_SYMMETRIC,
    ),
    _make,
    _weights,
    check=_check_words,
)

ASYMMETRIC = CompressedLayout(
    _NAME,
    (
        SchemeInfo(
            "int4-asym",
            4,
            "I32",
            NOT_LOADED,
            measured={"transformers": {}},
            limit=0.4,
            aliases=("w4a16_asym", "w4a16-asym", "int4_asym"),
            groups=(128, 64, 32),
            hardware=GPUS,
            error=0.101,
            errors={32: 0.0809**2, 64: 0.0911**2, 128: 0.1007**2},
        ),
    ),
    Kernel(
        "pack_int4_asymmetric",
        fits=True,
        without=dict.fromkeys(BY_DATA, "data chooses levels and scales, but no zero points"),
        encodes=_WITH_ZEROS,
    ),
    _make_asymmetric,
    _asymmetric_weights,
    check=_check_words,
)
