"""Kernels that pack a weight: raw bytes to torch and back around the pure functions of pack.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moeconv.plan.kernels import Buffer
from moeconv.plan.kernels.decode import decode_parts
from moeconv.plan.kernels.pack import pack_int, pack_int8_rowwise, pack_nf4
from moeconv.plan.kernels.pack.stacked import pack_slice
from moeconv.plan.kernels.stored import TORCH_DTYPES, to_bytes, to_tensor
from moeconv.plan.plan import Input, TensorSpec

# Items run side by side; torch's own threads would only fight them (3 to 20 times slower under load).
torch.set_num_threads(1)


def _weight(inputs: Sequence[tuple[Input, Buffer]]) -> torch.Tensor:
    ((ref, data),) = inputs
    return to_tensor(memoryview(data), ref.dtype, ref.shape)


def _ordered(parts: Mapping[str, torch.Tensor], params: Mapping[str, Any]) -> list[Buffer]:
    return [to_bytes(parts[name]) for name in params["parts"]]


def decode_kernel(
    inputs: Sequence[tuple[Input, Buffer]], outputs: Sequence[TensorSpec], params: Mapping[str, Any]
) -> list[Buffer]:
    """A stored weight as plain numbers in the output's dtype. params: parts, what each input is; how, its form."""
    (spec,) = outputs
    parts = {
        key: to_tensor(memoryview(data), ref.dtype, ref.shape) for key, (ref, data) in zip(params["parts"], inputs)
    }
    return [to_bytes(decode_parts(parts, name=spec.name, how=params["how"], dtype=TORCH_DTYPES[spec.dtype]))]


def pack_int_kernel(
    inputs: Sequence[tuple[Input, Buffer]], _outputs: Sequence[TensorSpec], params: Mapping[str, Any]
) -> list[Buffer]:
    """compressed-tensors codes, scales and shape. params: parts, bits, group_size; fit: least error."""
    size, fit = params["group_size"], params.get("fit", False)
    return _ordered(pack_int(_weight(inputs), bits=params["bits"], group_size=size, fit=fit), params)


def pack_bnb4_kernel(
    inputs: Sequence[tuple[Input, Buffer]], _outputs: Sequence[TensorSpec], params: Mapping[str, Any]
) -> list[Buffer]:
    """bitsandbytes 4-bit codes, absmax, map and state. params: parts, quant_type, block_size, nested."""
    return _ordered(pack_nf4(_weight(inputs), **_four_bits(params)), params)


def pack_bnb4_slice_kernel(
    inputs: Sequence[tuple[Input, Buffer]], _outputs: Sequence[TensorSpec], params: Mapping[str, Any]
) -> list[Buffer]:
    """One expert's share of tensors that hold all experts' 4-bit codes. params: as of pack_bnb4."""
    return _ordered(pack_slice(_weight(inputs), **_four_bits(params)), params)


def _four_bits(params: Mapping[str, Any]) -> dict[str, Any]:
    return {key: params[key] for key in ("block_size", "quant_type", "nested")}


def pack_bnb8_kernel(
    inputs: Sequence[tuple[Input, Buffer]], _outputs: Sequence[TensorSpec], params: Mapping[str, Any]
) -> list[Buffer]:
    """LLM.int8 row-wise codes and scales. params: parts."""
    return _ordered(pack_int8_rowwise(_weight(inputs)), params)
