"""compressed-tensors, one byte per weight, with activations that are quantized while the model runs: FP8 per row or per
128 x 128 block, and INT8 per row."""

from __future__ import annotations

from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.errors import InputError, escape
from moeconv.plan.plan import Item
from moeconv.quantize.compressed.layout import NOT_LOADED, NOT_RUN, CompressedLayout, float_scale, numbers
from moeconv.quantize.spec import BY_DATA, AsStored, Kernel, Scheme, SchemeInfo, codes

BLOCK = 128
_STORED = AsStored(("weight", "scale"))
_IN_BLOCKS = {"float8": _STORED, "float8-blocks": AsStored(("weight", "scale_inv"))}
_GRIDS = "moeconv.quantize.gptq.compressed_grids"
_SHARED = "rows share the scale of a block, and data chooses the codes of each row by itself"
BLOCKS = Kernel(
    "pack_float8_blocks",
    fits=True,
    without=dict.fromkeys(BY_DATA, _SHARED),
    encodes=_IN_BLOCKS,
)


def _rows(kernel: str, dtype: str, ref: TensorRef, role: str) -> Item:
    scales = (".weight_scale", "weight_scale", float_scale(ref), (ref.shape[0], 1))
    return codes(ref, kernel, [(".weight", "weight", dtype, ref.shape), scales], role)


def _blocks(ref: TensorRef, _: Scheme, role: str) -> Item:
    scales = (".weight_scale", "weight_scale", float_scale(ref), tuple(size // BLOCK for size in ref.shape))
    return codes(ref, "pack_float8_blocks", [(".weight", "weight", "F8_E4M3", ref.shape), scales], role, block=BLOCK)


def check_blocks(ref: TensorRef, scheme: Scheme) -> None:
    """Raises InputError for a weight that is not a whole number of blocks."""
    if any(size % BLOCK for size in ref.shape):
        raise InputError(
            f"tensor {escape(ref.name)!r} is {ref.shape[0]} x {ref.shape[1]}, which {scheme.name} cannot divide into "
            f"blocks of {BLOCK} x {BLOCK}",
            hint="Use --format compressed-tensors --scheme fp8, which has one scale per row, or leave this weight out "
            "with --scope.",
        )


FLOAT8 = CompressedLayout(
    "float-quantized",
    (
        SchemeInfo(
            "fp8",
            8,
            "F8_E4M3",
            NOT_RUN,
            measured={"transformers": {}},
            limit=0.12,
            aliases=("fp8_dynamic", "fp8-dynamic", "w8a8-fp8"),
            hardware=("ada", "h100", "b200"),
            error=0.0264,
            errors={None: 0.0264**2},
        ),
    ),
    Kernel("pack_float8", fits=True, grid=f"{_GRIDS}:FLOAT8", encodes={"float8": _STORED}),
    lambda ref, _, role: _rows("pack_float8", "F8_E4M3", ref, role),
    lambda _: numbers(8, "float", "channel"),
    lambda _: numbers(8, "float", "token", dynamic=True),
)

FLOAT8_BLOCKS = CompressedLayout(
    "float-quantized",
    (
        SchemeInfo(
            "fp8-block",
            8,
            "F8_E4M3",
            NOT_LOADED,
            measured={"transformers": {}},
            limit=0.12,
            aliases=("fp8_block",),
            groups=(BLOCK,),
            hardware=("ada", "h100", "b200"),
            error=0.0264,
        ),
    ),
    BLOCKS,
    _blocks,
    lambda _: numbers(8, "float", "block", block_structure=[BLOCK, BLOCK]),
    lambda _: numbers(8, "float", "group", dynamic=True, group_size=BLOCK),
    check=check_blocks,
)

INTEGER8 = CompressedLayout(
    "int-quantized",
    (
        SchemeInfo(
            "w8a8",
            8,
            "I8",
            NOT_LOADED | {"vllm": "ok"},
            measured={"transformers": {}, "vllm": {"qwen3_moe": "same"}},
            limit=0.1,
            aliases=("int8_w8a8", "w8a8-int8"),
            hardware=("ampere", "ada", "h100", "cpu"),
            error=0.0091,
            errors={None: 0.0091**2},
        ),
    ),
    Kernel("pack_int8_rows", fits=True, grid=f"{_GRIDS}:INT8_ROWS", encodes={"int8": _STORED}),
    lambda ref, _, role: _rows("pack_int8_rows", "I8", ref, role),
    lambda _: numbers(8, "int", "channel"),
    lambda _: numbers(8, "int", "token", dynamic=True),
)
