"""compressed-tensors, the formats of OCP Microscaling (2023): groups of 32 with a power of two as their scale. MXFP4
leaves activations as they are; MXFP8 quantizes them while the model runs."""

from __future__ import annotations

from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.plan.plan import Item
from moeconv.quantize.compressed.layout import NOT_LOADED, NOT_RUN, CompressedLayout, numbers
from moeconv.quantize.spec import GPUS, AsStored, Kernel, Part, Scheme, SchemeInfo, codes

_GROUP = 32
_GRIDS = "moeconv.quantize.gptq.compressed_grids"
_EXPONENTS = {"group_size": _GROUP, "scale_dtype": "torch.uint8"}


def _exponents(ref: TensorRef) -> Part:
    return ".weight_scale", "weight_scale", "U8", (ref.shape[0], ref.shape[1] // _GROUP)


def _make4(ref: TensorRef, _: Scheme, role: str) -> Item:
    packed = (".weight_packed", "weight_packed", "U8", (ref.shape[0], ref.shape[1] // 2))
    return codes(ref, "pack_mxfp4", [packed, _exponents(ref)], role)


def _make8(ref: TensorRef, _: Scheme, role: str) -> Item:
    return codes(ref, "pack_mxfp8", [(".weight", "weight", "F8_E4M3", ref.shape), _exponents(ref)], role)


MXFP4 = CompressedLayout(
    "mxfp4-pack-quantized",
    (
        SchemeInfo(
            "mxfp4",
            4,
            "U8",
            NOT_RUN,
            measured={"transformers": {}},
            limit=0.5,
            aliases=("mxfp4a16",),
            groups=(_GROUP,),
            hardware=GPUS,
            error=0.115,
            errors={_GROUP: 0.115**2},
        ),
    ),
    Kernel(
        "pack_mxfp4",
        fits=True,
        grid=f"{_GRIDS}:MXFP4",
        encodes={"mxfp4-rows": AsStored(("packed", "scale"))},
    ),
    _make4,
    lambda _: numbers(4, "float", "group", **_EXPONENTS),
)

MXFP8 = CompressedLayout(
    "mxfp8-quantized",
    (
        SchemeInfo(
            "mxfp8",
            8,
            "F8_E4M3",
            NOT_LOADED,
            measured={"transformers": {}},
            limit=0.12,
            groups=(_GROUP,),
            hardware=("b200",),
            error=0.0264,
            errors={_GROUP: 0.0264**2},
        ),
    ),
    Kernel(
        "pack_mxfp8",
        fits=True,
        grid=f"{_GRIDS}:MXFP8",
        encodes={"mxfp8-rows": AsStored(("weight", "scale"))},
    ),
    _make8,
    lambda _: numbers(8, "float", "group", **_EXPONENTS),
    lambda _: numbers(8, "float", "group", dynamic=True, **_EXPONENTS),
)
