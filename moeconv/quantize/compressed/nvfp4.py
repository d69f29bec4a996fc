"""compressed-tensors, nvfp4-pack-quantized: E2M1 codes in groups of 16 with FP8 scales, and one scale for the weights
that an engine joins to one matrix; activations stay as they are (W4A16)."""

from __future__ import annotations

from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.plan.plan import Item
from moeconv.quantize.compressed.layout import NOT_LOADED, CompressedLayout, numbers
from moeconv.quantize.spec import GPUS, Kernel, Scheme, SchemeInfo, codes

_GROUP = 16


def _make(ref: TensorRef, _: Scheme, role: str) -> Item:
    out, width = ref.shape
    parts = [
        (".weight_packed", "weight_packed", "U8", (out, width // 2)),
        (".weight_scale", "weight_scale", "F8_E4M3", (out, width // _GROUP)),
        (".weight_global_scale", "weight_global_scale", "F32", (1,)),
    ]
    return codes(ref, "pack_nvfp4", parts, role)


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
    Kernel("pack_nvfp4", fits=True, grid="moeconv.quantize.gptq.compressed_grids:NVFP4"),
    _make,
    lambda _: numbers(4, "float", "tensor_group", group_size=_GROUP, scale_dtype="torch.float8_e4m3fn"),
)
