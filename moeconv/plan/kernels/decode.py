"""Decodes the parts of a stored weight to the float weight: one decoder per stored form, by the name of the form.

Imports torch; kernels and the measuring commands import this module lazily.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moeconv.errors import InputError, escape
from moeconv.plan.kernels.pack import floats
from moeconv.plan.kernels.pack.autoawq import unpack_awq
from moeconv.plan.kernels.pack.autogptq import unpack_gptq
from moeconv.plan.kernels.pack.fourbit import unpack_nf4
from moeconv.plan.kernels.pack.integer import unpack_int, unpack_levels
from moeconv.plan.kernels.pack.mlx import unpack_mlx
from moeconv.plan.kernels.pack.rowwise import unpack_int8_rowwise
from moeconv.plan.kernels.pack.stacked import unpack_stacked
from moeconv.types import Config

# How a weight is stored: form (a row of DECODERS), bits, grid (rows and columns that share a scale, None for all),
# shape.
How = Config
Parts = Mapping[str, Tensor]


def decode_parts(parts: Parts, *, name: str, how: How | None, dtype: torch.dtype | None = None) -> Tensor:
    """The float weight from its stored parts, which are keyed by what each part is. `how` None stands for a plain
    tensor, whose only part is "weight".

    With `dtype` None, the result has the dtype that stock runtimes compute with: compressed-tensors decodes to the
    dtype of its scales, bitsandbytes 4-bit to the dtype that was packed, row-wise INT8 and FP8 blocks to float32,
    four-bit floats to bfloat16. Raises InputError for parts that are missing, or that do not decode to the shape in
    `how`.
    """
    if how is None:
        return _plain(parts, name=name, dtype=dtype)
    try:
        tensor = DECODERS[how["form"]](parts, how, dtype)
    except KeyError as error:
        raise InputError(f"{escape(name)} has no part {error}", hint="The checkpoint is incomplete.") from None
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"{escape(name)} cannot be decoded: {escape(error)}",
            hint="The checkpoint is damaged, or packed in a way that moeconv does not know.",
        ) from None
    # of a tensor of all experts, any number of experts may be given
    if list(tensor.shape[-2:]) != how["shape"][-2:] or tensor.ndim != len(how["shape"]):
        raise InputError(
            f"{escape(name)} decodes to shape {list(tensor.shape)}, and by config.json it is {list(how['shape'])}",
            hint="config.json and the shards do not belong together.",
        )
    return tensor if dtype is None else tensor.to(dtype)


def _plain(parts: Parts, *, name: str, dtype: torch.dtype | None) -> Tensor:
    if set(parts) != {"weight"} or parts["weight"].dtype not in _PLAIN:
        found = ", ".join(f"{part} {str(t.dtype).removeprefix('torch.')}" for part, t in parts.items())
        raise InputError(
            f"{escape(name)} is packed in a way that moeconv does not read ({found})",
            hint="Give the unquantized checkpoint.",
        )
    return parts["weight"] if dtype is None else parts["weight"].to(dtype)


_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _packed_int(parts: Parts, how: How, dtype: torch.dtype | None) -> Tensor:
    stated = parts["shape"].tolist()
    if stated != list(how["shape"]):
        raise ValueError(f"its weight_shape is {stated}, and by config.json it is {list(how['shape'])}")
    zero_points = parts.get("zero_point")
    rows = stated[0]
    scales = parts["scale"].reshape(1, 1).expand(rows, 1) if parts["scale"].numel() == 1 else parts["scale"]
    if zero_points is not None and zero_points.dtype == torch.int8:
        zero_points = zero_points.reshape(1, 1).expand(rows, 1)
    elif zero_points is not None:
        zero_points = unpack_levels(zero_points.T, bits=how["bits"], columns=rows).T
    words = {"weight_packed": parts["packed"], "weight_scale": scales, "weight_shape": parts["shape"]}
    return unpack_int(words, bits=how["bits"], dtype=dtype, zero_points=zero_points)


def _codes8(parts: Parts, how: How, _dtype: torch.dtype | None) -> Tensor:
    """One byte per weight: (code - zero point) * scale in the dtype of the scale, as compressed-tensors computes it."""
    scales = parts["scale"]
    codes = parts["weight"]
    values = floats.widened(codes, scales.dtype) if codes.is_floating_point() else codes.to(scales.dtype)
    if "zero_point" in parts:
        values -= floats.spread(parts["zero_point"].to(scales.dtype), how["grid"], values.shape)
    return floats.times(values, scales, how["grid"])


def _float8_blocks(parts: Parts, how: How, _dtype: torch.dtype | None) -> Tensor:
    return floats.times(floats.widened(parts["weight"], torch.float32), parts["scale_inv"].float(), how["grid"])


def _bitsandbytes4(parts: Parts, how: How, dtype: torch.dtype | None) -> Tensor:
    if len(how["shape"]) == 3:
        return unpack_stacked({_STACKED.get(part, part): t for part, t in parts.items()}, dtype=dtype)
    state = {"quant_state.bitsandbytes__": parts["state"], "": parts["weight"]}
    return unpack_nf4({**state, **{k: v for k, v in parts.items() if k not in ("state", "weight")}}, dtype=dtype)


def _bitsandbytes8(parts: Parts, how: How, dtype: torch.dtype | None) -> Tensor:
    if len(how["shape"]) == 3:
        return unpack_stacked({"": parts["weight"], "scb": parts["SCB"]}, dtype=dtype)
    return unpack_int8_rowwise({"": parts["weight"], "SCB": parts["SCB"]}, dtype=dtype or torch.float32)


_STACKED = {"weight": "", "state": "quant_state"}


def _mlx(parts: Parts, how: How, dtype: torch.dtype | None) -> Tensor:
    mode = str(how["form"]).removeprefix("mlx-")
    return unpack_mlx(parts, mode=mode, bits=how["bits"], dtype=dtype)


def _gptq(parts: Parts, how: How, _dtype: torch.dtype | None) -> Tensor:
    return unpack_gptq(parts, bits=how["bits"], group_size=how["grid"][1], offset=how["form"] == "gptq")


DECODERS: Mapping[str, Callable[[Parts, How, torch.dtype | None], Tensor]] = {
    "packed-int": _packed_int,
    "int8": _codes8,
    "float8": _codes8,
    "float8-blocks": _float8_blocks,
    "nvfp4": lambda parts, _how, _dtype: floats.unpack_nvfp4(parts["packed"], parts["scale"], parts["global_scale"]),
    "nvfp4-modelopt": lambda parts, _how, _dtype: floats.unpack_modelopt(
        parts["weight"], parts["scale"], parts["scale_2"]
    ),
    "mxfp4-rows": lambda parts, _how, _dtype: floats.unpack_mxfp4_rows(parts["packed"], parts["scale"]),
    "mxfp8-rows": lambda parts, _how, _dtype: floats.unpack_mxfp8_rows(parts["weight"], parts["scale"]),
    "bitsandbytes4": _bitsandbytes4,
    "bitsandbytes8": _bitsandbytes8,
    "mxfp4": lambda parts, _how, _dtype: floats.unpack_mxfp4(parts["blocks"], parts["exponents"]),
    "gptq": _gptq,
    "gptq-v2": _gptq,
    "awq": lambda parts, how, _dtype: unpack_awq(parts, group_size=how["grid"][1]),
    **dict.fromkeys(("mlx-affine", "mlx-mxfp4", "mlx-nvfp4", "mlx-mxfp8"), _mlx),
}
