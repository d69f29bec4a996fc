"""Kernels that pack a weight in the layouts of compressed-tensors and DeepSeek: raw bytes to tensors and back, around
the pure functions of kernels/pack/. The parameter `fit` asks for scales of least squared error."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moeconv.plan.kernels import Buffer
from moeconv.plan.kernels.pack.asymmetric import pack_int4_asymmetric
from moeconv.plan.kernels.pack.eightbit import pack_float8, pack_float8_blocks, pack_int8_rows, pack_mxfp8
from moeconv.plan.kernels.pack.fp4 import pack_mxfp4, pack_nvfp4
from moeconv.plan.kernels.quantized import ordered, weight_of
from moeconv.plan.kernels.stored import to_bytes, to_tensor
from moeconv.plan.plan import Input, Params, TensorSpec

Read = Sequence[tuple[Input, Buffer]]


def _fit(params: Params) -> bool:
    return bool(params.get("fit"))


def pack_float8_kernel(inputs: Read, _outputs: Sequence[TensorSpec], params: Params) -> list[Buffer]:
    """FP8 codes and one scale per row. params: parts, fit."""
    return ordered(pack_float8(weight_of(inputs), fit=_fit(params)), params)


def pack_float8_blocks_kernel(inputs: Read, _outputs: Sequence[TensorSpec], params: Params) -> list[Buffer]:
    """FP8 codes and one scale per block. params: parts, block, fit; wide: scales are float32."""
    dtype = torch.float32 if params.get("wide") else None
    return ordered(pack_float8_blocks(weight_of(inputs), block=params["block"], dtype=dtype, fit=_fit(params)), params)


def pack_int8_rows_kernel(inputs: Read, _outputs: Sequence[TensorSpec], params: Params) -> list[Buffer]:
    """INT8 levels and one scale per row. params: parts, fit."""
    return ordered(pack_int8_rows(weight_of(inputs), fit=_fit(params)), params)


def pack_mxfp8_kernel(inputs: Read, _outputs: Sequence[TensorSpec], params: Params) -> list[Buffer]:
    """MXFP8 codes and exponents. params: parts, fit."""
    return ordered(pack_mxfp8(weight_of(inputs), fit=_fit(params)), params)


def pack_mxfp4_kernel(inputs: Read, _outputs: Sequence[TensorSpec], params: Params) -> list[Buffer]:
    """MXFP4 codes and exponents. params: parts, fit."""
    return ordered(pack_mxfp4(weight_of(inputs), fit=_fit(params)), params)


def pack_mxfp4_blocks_kernel(inputs: Read, _outputs: Sequence[TensorSpec], params: Params) -> list[Buffer]:
    """MXFP4 blocks and exponents of one expert's matrix, which is [in, out] as gpt-oss has it. params: parts."""
    made = pack_mxfp4(weight_of(inputs).T.contiguous(), signed_zeros=True)
    return ordered({"blocks": made["weight_packed"], "exponents": made["weight_scale"]}, params)


def pack_nvfp4_kernel(inputs: Read, _outputs: Sequence[TensorSpec], params: Params) -> list[Buffer]:
    """NVFP4 codes and scales of the first input, with the global scale of all inputs. params: parts, fit."""
    weight, *beside = (to_tensor(memoryview(data), ref.dtype, ref.shape) for ref, data in inputs)
    return ordered(pack_nvfp4(weight, beside=beside, fit=_fit(params)), params)


def pack_int4_asymmetric_kernel(inputs: Read, _outputs: Sequence[TensorSpec], params: Params) -> list[Buffer]:
    """INT4 codes, scales, zero points and shape. params: parts, group_size, fit."""
    made = pack_int4_asymmetric(weight_of(inputs), group_size=params["group_size"], fit=_fit(params))
    return ordered(made, params)


def nvfp4_from_modelopt(inputs: Read, _outputs: Sequence[TensorSpec], _params: Params) -> list[Buffer]:
    """The codes and scales of ModelOpt's NVFP4 as they are, and the inverse of its second scale."""
    (_, packed), (_, scales), (ref, second) = inputs
    return [packed, scales, to_bytes(to_tensor(memoryview(second), ref.dtype, ref.shape).reciprocal())]
