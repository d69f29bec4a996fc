"""How a packed weight is stored: which parts it needs, with which dtypes and shapes, given the weight's own shape.

PARTS has one row per stored form. `methods.py` reads a quantization_config into an Encoding. Opening a checkpoint
compares every header with the Encoding, and a kernel decodes the weight with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

NESTED_BLOCK = 256  # scales per block of double quantization, a constant in bitsandbytes' quantize_4bit
SCALES = ("BF16", "F16", "F32")
Shape = tuple[int, ...]
ANY_LENGTH: tuple[Shape, ...] = ()  # one dimension, of a length that does not follow from the weight's shape
_ONE: tuple[Shape, ...] = ((), (1,), (1, 1))


@dataclass(frozen=True, slots=True)
class Encoding:
    """A stored form with its parameters.

    `name` is its row in PARTS. `grid` is (rows, columns) of the weights that share a scale; None stands for the whole
    axis. `zero_points` is true if the levels have an offset, `nested` if the scales are quantized too, `static` if the
    scale of the activations is stored beside the weight. `block` is the number of weights per block of bitsandbytes'
    4-bit codes, and `quant_type` is bitsandbytes' name for these codes. `scale` is the part that has the scales. With
    `ordered`, the group of each column is stored beside the weight.
    """

    name: str
    bits: int
    grid: tuple[int | None, int | None] = (None, None)
    zero_points: bool = False
    nested: bool = False
    static: bool = False
    block: int = 64
    scale: str = "scale"
    quant_type: str = "nf4"
    ordered: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """What one tensor of a packed weight must be.

    Its dtype and its shape must be among `dtypes` and `shapes`. A part that is not `needed` may be missing. `suffix`
    replaces ".weight" in its name, if the name of the part alone does not determine it.
    """

    dtypes: tuple[str, ...]
    shapes: tuple[Shape, ...]
    needed: bool = True
    suffix: str = ""


@lru_cache(maxsize=4096)
def parts_of(encoding: Encoding, shape: Shape, *, stacked: bool = False) -> dict[str, Part]:
    """The parts of which a weight of this shape is stored, by name.

    `stacked`: the first axis counts experts, and each expert's matrix is encoded by itself. Raises ValueError for a
    shape that cannot be stored in this form.
    """
    made = dict(PARTS[encoding.name](encoding, shape, stacked))
    if encoding.static or encoding.bits == 8:  # an 8-bit weight may have a scale of activations that nothing reads
        made["input_scale"] = Part(SCALES, _ONE, needed=encoding.static, suffix=_INPUT.get(encoding.name, ""))
    return made


_INPUT = {"float8-blocks": ".activation_scale", "nvfp4": ".input_global_scale"}


def scale_grid(encoding: Encoding, shape: Shape) -> Shape:
    """The shape of the scales of a weight [..., rows, columns]: one per block of `grid`, also for a cut-off block."""
    *front, rows, columns = shape
    high, wide = encoding.grid
    return (*front, -(-rows // (high or rows)), -(-columns // (wide or columns)))


def _scales(encoding: Encoding, shape: Shape) -> tuple[Shape, ...]:
    high, wide = encoding.grid
    if high == 1 and wide and shape[-1] % wide:
        raise ValueError(f"groups of {wide} do not divide {shape[-1]} columns")
    return _ONE if encoding.grid == (None, None) and len(shape) == 2 else (scale_grid(encoding, shape),)


def _packed_int(encoding: Encoding, shape: Shape, _stacked: bool) -> dict[str, Part]:
    """compressed-tensors pack-quantized: levels in 32-bit words along a row, zero points along a column."""
    rows, columns = shape
    groups = scale_grid(encoding, shape)[1]
    made = {
        "packed": Part(("I32",), ((rows, -(-columns * encoding.bits // 32)),)),
        "scale": Part(SCALES, _scales(encoding, shape)),
        "shape": Part(("I64", "I32"), ((2,),)),
    }
    if encoding.zero_points:
        whole = encoding.grid == (None, None)  # one zero point is not packed
        words = Part(("I32",), ((-(-rows * encoding.bits // 32), groups),))
        made["zero_point"] = Part(("I8",), _ONE) if whole else words
    return made


def _codes8(dtype: str) -> Callable[[Encoding, Shape, bool], dict[str, Part]]:
    """One byte per weight, and the scales in a tensor of their own."""

    def parts(encoding: Encoding, shape: Shape, _stacked: bool) -> dict[str, Part]:
        scales = _scales(encoding, shape)
        made = {"weight": Part((dtype,), (shape,)), encoding.scale: Part(SCALES, scales)}
        return made | ({"zero_point": Part(("I8",), scales)} if encoding.zero_points else {})

    return parts


def _mxfp8(encoding: Encoding, shape: Shape, _stacked: bool) -> dict[str, Part]:
    """compressed-tensors MXFP8: one byte per weight, and exponents."""
    return {
        "weight": Part(("F8_E4M3",), (shape,)),
        "scale": Part(("U8", "F8_E8M0"), _scales(encoding, shape)),
    }


def _fp4(scale_dtypes: tuple[str, ...], *, whole: bool) -> Callable[[Encoding, Shape, bool], dict[str, Part]]:
    """compressed-tensors NVFP4 and MXFP4: two codes per byte; `whole`: one more scale for the whole weight."""

    def parts(encoding: Encoding, shape: Shape, _stacked: bool) -> dict[str, Part]:
        rows, columns = shape
        made = {
            "packed": Part(("U8",), ((rows, -(-columns // 2)),)),
            "scale": Part(scale_dtypes, _scales(encoding, shape)),
        }
        return made | ({"global_scale": Part(("F32",), _ONE)} if whole else {})

    return parts


def _modelopt(encoding: Encoding, shape: Shape, _stacked: bool) -> dict[str, Part]:
    """ModelOpt's NVFP4: the parts of compressed-tensors under other names, with the inverse of its second scale."""
    rows, columns = shape
    return {
        "weight": Part(("U8",), ((rows, -(-columns // 2)),)),
        "scale": Part(("F8_E4M3",), _scales(encoding, shape)),
        "scale_2": Part(("F32",), _ONE),
        "input_scale": Part(SCALES, _ONE, needed=False),
    }


def _bitsandbytes4(encoding: Encoding, shape: Shape, stacked: bool) -> dict[str, Part]:
    front, numel = (shape[:1], math.prod(shape[1:])) if stacked else ((), math.prod(shape))
    blocks = -(-numel // encoding.block)
    made = {
        "weight": Part(("U8",), ((*front, (numel + 1) // 2, 1),)),
        "absmax": Part(("U8",) if encoding.nested else ("F32",), ((*front, blocks),)),
        "quant_map": Part(("F32",), ((16,),)),
        "state": Part(
            ("U8",), ANY_LENGTH, suffix="" if stacked else f".weight.quant_state.bitsandbytes__{encoding.quant_type}"
        ),
    }
    if encoding.nested:
        made["nested_absmax"] = Part(("F32",), ((*front, -(-blocks // NESTED_BLOCK)),))
        made["nested_quant_map"] = Part(("F32",), ((256,),))
    if encoding.nested and stacked:  # a single matrix has it in the state
        made["nested_offset"] = Part(("F32",), ((*front, 1),))
    return made


def _bitsandbytes8(_encoding: Encoding, shape: Shape, _stacked: bool) -> dict[str, Part]:
    return {
        "weight": Part(("I8",), (shape,)),
        "SCB": Part(("F32",), (shape[:-1],)),
        "format": Part(("U8",), _ONE, needed=False),  # the order of the codes: bitsandbytes now has only one
    }


def _mxfp4(_encoding: Encoding, shape: Shape, _stacked: bool) -> dict[str, Part]:
    """gpt-oss: codes and exponents of all experts, in groups along the input dimension of a projection."""
    experts, columns, rows = shape  # decoded, they are [E, in, out]
    groups = -(-columns // 32)
    return {
        "blocks": Part(("U8",), ((experts, rows, groups, 16),)),
        "exponents": Part(("U8",), ((experts, rows, groups),)),
    }


def _mlx(encoding: Encoding, shape: Shape, _stacked: bool) -> dict[str, Part]:
    """MLX: codes in 32-bit words along a row, with a scale per group and, for integers, the value of code 0."""
    *front, columns = shape
    words, bits = divmod(columns * encoding.bits, 32)
    if bits or columns % (encoding.grid[1] or columns):
        raise ValueError(f"groups of {encoding.grid[1]} codes do not fill {columns} columns")
    affine = encoding.name == "mlx-affine"
    scales = Part(SCALES if affine else ("U8",), (scale_grid(encoding, shape),))
    made = {"weight": Part(("U32",), ((*front, words),)), "scales": scales}
    return made | ({"biases": scales} if affine else {})


def _gptq(encoding: Encoding, shape: Shape, _stacked: bool) -> dict[str, Part]:
    """GPTQ: the transposed weight, with codes in 32-bit words along the input dimension and zero points along the
    output dimension."""
    rows, columns = shape
    if columns * encoding.bits % 32 or rows * encoding.bits % 32:
        raise ValueError(f"codes of {encoding.bits} bits do not fill whole 32-bit words in a weight {list(shape)}")
    groups = -(-columns // (encoding.grid[1] or columns))
    return {
        "qweight": Part(("I32",), ((columns * encoding.bits // 32, rows),)),
        "qzeros": Part(("I32",), ((groups, rows * encoding.bits // 32),)),
        "scales": Part(("F16", "BF16", "F32"), ((groups, rows),)),
        "g_idx": Part(("I32", "I64"), ((columns,),), needed=encoding.ordered),
    }


def _awq(encoding: Encoding, shape: Shape, _stacked: bool) -> dict[str, Part]:
    """AWQ: the transposed weight, with codes and zero points in 32-bit words along the output dimension."""
    rows, columns = shape
    if rows % 8 or columns % (encoding.grid[1] or columns):
        raise ValueError(
            f"groups of {encoding.grid[1]} or 32-bit words of 8 codes do not divide a weight {list(shape)}"
        )
    groups = columns // (encoding.grid[1] or columns)
    return {
        "qweight": Part(("I32",), ((columns, rows // 8),)),
        "qzeros": Part(("I32",), ((groups, rows // 8),)),
        "scales": Part(("F16", "BF16", "F32"), ((groups, rows),)),
    }


PARTS: Mapping[str, Callable[[Encoding, Shape, bool], dict[str, Part]]] = {
    "packed-int": _packed_int,
    "int8": _codes8("I8"),
    "float8": _codes8("F8_E4M3"),
    "float8-blocks": _codes8("F8_E4M3"),
    "nvfp4": _fp4(("F8_E4M3",), whole=True),
    "nvfp4-modelopt": _modelopt,
    "mxfp4-rows": _fp4(("U8", "F8_E8M0"), whole=False),
    "mxfp8-rows": _mxfp8,
    "bitsandbytes4": _bitsandbytes4,
    "bitsandbytes8": _bitsandbytes8,
    "mxfp4": _mxfp4,
    "gptq": _gptq,
    "gptq-v2": _gptq,
    "awq": _awq,
    **dict.fromkeys(("mlx-affine", "mlx-mxfp4", "mlx-nvfp4", "mlx-mxfp8"), _mlx),
}
