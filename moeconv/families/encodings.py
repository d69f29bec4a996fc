"""How a packed weight is stored: which parts it needs, with which dtypes and shapes, given the weight's own shape.

PARTS has one row per stored form. `methods.py` reads a quantization_config into an Encoding; opening a checkpoint
compares every header with it, and a kernel decodes by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

NESTED_BLOCK = 256  # scales in a block of double quantization, fixed in bitsandbytes' quantize_4bit
SCALES = ("BF16", "F16", "F32")
Shape = tuple[int, ...]
ANY_LENGTH: tuple[Shape, ...] = ()  # one dimension, of a length that the headers do not tell
_ONE: tuple[Shape, ...] = ((), (1,), (1, 1))


@dataclass(frozen=True, slots=True)
class Encoding:
    """A stored form with its numbers. `name` is its row in PARTS; `grid` is (rows, columns) of weights that share a
    scale, None for all of that axis; `zero_points` says that levels have an offset; `nested` that the scales are
    quantized too; `static` that the scale of what multiplies the weight is stored beside it. `block` is weights in a
    block of bitsandbytes' 4-bit codes, `quant_type` its word for them. `scale` names the part with the scales."""

    name: str
    bits: int
    grid: tuple[int | None, int | None] = (None, None)
    zero_points: bool = False
    nested: bool = False
    static: bool = False
    block: int = 64
    scale: str = "scale"
    quant_type: str = "nf4"


@dataclass(frozen=True, slots=True)
class Part:
    """What one tensor of a packed weight must be: a dtype and a shape among these; a part that is not `needed` may be
    there or not. `suffix` is what its name has in place of .weight, where the part alone does not tell."""

    dtypes: tuple[str, ...]
    shapes: tuple[Shape, ...]
    needed: bool = True
    suffix: str = ""


@lru_cache(maxsize=4096)
def parts_of(encoding: Encoding, shape: Shape, *, stacked: bool = False) -> dict[str, Part]:
    """What a weight of this shape is stored as; `stacked`: its first axis counts experts, whose codes are those of each
    matrix alone. Raises ValueError for a shape that cannot be stored so."""
    made = dict(PARTS[encoding.name](encoding, shape, stacked))
    if encoding.static or encoding.bits == 8:  # a static scale is needed, and one without need does no harm
        made["input_scale"] = Part(SCALES, _ONE, needed=encoding.static, suffix=_INPUT.get(encoding.name, ""))
    return made


_INPUT = {"float8-blocks": ".activation_scale", "nvfp4": ".input_global_scale"}


def scale_grid(encoding: Encoding, shape: Shape) -> Shape:
    """The shape of the scales of a weight [..., rows, columns]: one for every block of `grid`, cut off at the edges."""
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
    """A byte for each weight, with scales beside it."""

    def parts(encoding: Encoding, shape: Shape, _stacked: bool) -> dict[str, Part]:
        scales = _scales(encoding, shape)
        made = {"weight": Part((dtype,), (shape,)), encoding.scale: Part(SCALES, scales)}
        return made | ({"zero_point": Part(("I8",), scales)} if encoding.zero_points else {})

    return parts


def _fp4(scale_dtypes: tuple[str, ...], *, whole: bool) -> Callable[[Encoding, Shape, bool], dict[str, Part]]:
    """compressed-tensors NVFP4 and MXFP4: two codes to a byte; `whole`: one more scale for all of the weight."""

    def parts(encoding: Encoding, shape: Shape, _stacked: bool) -> dict[str, Part]:
        rows, columns = shape
        made = {
            "packed": Part(("U8",), ((rows, -(-columns // 2)),)),
            "scale": Part(scale_dtypes, _scales(encoding, shape)),
        }
        return made | ({"global_scale": Part(("F32",), _ONE)} if whole else {})

    return parts


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
        "format": Part(("U8",), _ONE, needed=False),  # which order the codes are in: bitsandbytes knows one by now
    }


def _mxfp4(_encoding: Encoding, shape: Shape, _stacked: bool) -> dict[str, Part]:
    """gpt-oss: codes and exponents of all experts, along what a row of a projection multiplies."""
    experts, columns, rows = shape  # decoded, they are [E, in, out]
    groups = -(-columns // 32)
    return {
        "blocks": Part(("U8",), ((experts, rows, groups, 16),)),
        "exponents": Part(("U8",), ((experts, rows, groups),)),
    }


PARTS: Mapping[str, Callable[[Encoding, Shape, bool], dict[str, Part]]] = {
    "packed-int": _packed_int,
    "int8": _codes8("I8"),
    "float8": _codes8("F8_E4M3"),
    "float8-blocks": _codes8("F8_E4M3"),
    "nvfp4": _fp4(("F8_E4M3",), whole=True),
    "mxfp4-rows": _fp4(("U8", "F8_E8M0"), whole=False),
    "bitsandbytes4": _bitsandbytes4,
    "bitsandbytes8": _bitsandbytes8,
    "mxfp4": _mxfp4,
}
