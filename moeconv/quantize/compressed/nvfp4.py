"""compressed-tensors, nvfp4-pack-quantized: E2M1 codes in groups of 16 with FP8 scales, and one scale for the weights
that an engine joins to one matrix. Activations stay as they are (W4A16), or are quantized to the same numbers while the
model runs, with a scale of the whole tensor that was measured (W4A4)."""

from __future__ import annotations

from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.plan.plan import Item
from moeconv.quantize.compressed.layout import NOT_LOADED, CompressedLayout, numbers
from moeconv.quantize.spec import GPUS, AsStored, Kernel, Scheme, SchemeInfo, codes
from moeconv.types import JsonObject

_GROUP = 16
_ENCODES = {
    "nvfp4": AsStored(("packed", "scale", "global_scale")),
    "nvfp4-modelopt": AsStored(("weight", "scale", "scale_2"), "nvfp4_from_modelopt"),
}


def _make(ref: TensorRef, _: Scheme, role: str) -> Item:
    out, width = ref.shape
    parts = [
        (".weight_packed", "weight_packed", "U8", (out, width // 2)),
        (".weight_scale", "weight_scale", "F8_E4M3", (out, width // _GROUP)),
        (".weight_global_scale", "weight_global_scale", "F32", (1,)),
    ]
    return codes(ref, "pack_nvfp4", parts, role)


def _numbers(_: Scheme) -> JsonObject:
    return numbers(4, "float", "tensor_group", group_size=_GROUP, scale_dtype="torch.float8_e4m3fn")


NVFP4 = CompressedLayout(
    "nvfp4-pack-quantized",
    (
        SchemeInfo(
            "nvfp4",
            4,
            "U8",
            NOT_LOADED,
            measured={"transformers": {}},
            limit=0.4,
            aliases=("nvfp4a16",),
            groups=(_GROUP,),
            joined=True,
            hardware=GPUS,
            error=0.0952,
            errors={_GROUP: 0.0952**2},
        ),
    ),
    Kernel("pack_nvfp4", fits=True, grid="moeconv.quantize.gptq.compressed_grids:NVFP4", encodes=_ENCODES),
    _make,
    _numbers,
)

NVFP4_A4 = CompressedLayout(
    NVFP4.name,
    (
        SchemeInfo(
            "nvfp4-a4",
            4,
            "U8",
            NOT_LOADED,
            limit=0.4,
            aliases=("nvfp4a4", "w4a4-nvfp4"),
            groups=(_GROUP,),
            joined=True,
            hardware=("b200",),
            error=0.0952,
            inputs=True,
        ),
    ),
    NVFP4.kernel,
    _make,
    _numbers,
    lambda scheme: _numbers(scheme) | {"dynamic": "local", "observer": "static_minmax"},
)
