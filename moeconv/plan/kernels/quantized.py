"""Kernels that pack a weight: raw bytes to torch tensors and back, around the pure functions of kernels/pack/."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from moeconv.plan.kernels import Buffer
from moeconv.plan.kernels.decode import decode_parts
from moeconv.plan.kernels.pack import pack_int, pack_int8_rowwise, pack_nf4
from moeconv.plan.kernels.pack.mlx import pack_mlx
from moeconv.plan.kernels.pack.stacked import pack_slice
from moeconv.plan.kernels.stored import TORCH_DTYPES, to_bytes, to_tensor
from moeconv.plan.plan import Input, Params, TensorSpec
from moeconv.types import JsonObject

# Items run in parallel, and the threads of torch would compete with them: that is 3 to 20 times slower under load.
torch.set_num_threads(1)


def weight_of(inputs: Sequence[tuple[Input, Buffer]]) -> torch.Tensor:
    """The only input, as a tensor."""
    ((ref, data),) = inputs
    return to_tensor(memoryview(data), ref.dtype, ref.shape)


def ordered(parts: Mapping[str, torch.Tensor], params: Params) -> list[Buffer]:
    """The packed tensors as bytes, in the order of the outputs."""
    return [to_bytes(parts[name]) for name in params["parts"]]


def decode_kernel(
    inputs: Sequence[tuple[Input, Buffer]], outputs: Sequence[TensorSpec], params: Params
) -> list[Buffer]:
    """A stored weight as floats in the output's dtype. params: parts (what each input is), how (its form)."""
    (spec,) = outputs
    parts = {
        key: to_tensor(memoryview(data), ref.dtype, ref.shape) for key, (ref, data) in zip(params["parts"], inputs)
    }
    return [to_bytes(decode_parts(parts, name=spec.name, how=params["how"], dtype=TORCH_DTYPES[spec.dtype]))]


def pack_int_kernel(
    inputs: Sequence[tuple[Input, Buffer]], _outputs: Sequence[TensorSpec], params: Params
) -> list[Buffer]:
    """Codes, scales and shape of compressed-tensors. params: parts, bits, group_size; fit: search scales of least
    error."""
    size, fit = params["group_size"], params.get("fit", False)
    return ordered(pack_int(weight_of(inputs), bits=params["bits"], group_size=size, fit=fit), params)


def pack_bnb4_kernel(
    inputs: Sequence[tuple[Input, Buffer]], _outputs: Sequence[TensorSpec], params: Params
) -> list[Buffer]:
    """4-bit codes, absmax, map and state of bitsandbytes. params: parts, quant_type, block_size, nested."""
    return ordered(pack_nf4(weight_of(inputs), **_four_bits(params)), params)


def pack_bnb4_slice_kernel(
    inputs: Sequence[tuple[Input, Buffer]], _outputs: Sequence[TensorSpec], params: Params
) -> list[Buffer]:
    """One expert's slice of the tensors that hold the 4-bit codes of all experts. params: those of pack_bnb4."""
    return ordered(pack_slice(weight_of(inputs), **_four_bits(params)), params)


def _four_bits(params: Params) -> JsonObject:
    return {key: params[key] for key in ("block_size", "quant_type", "nested")}


def pack_mlx_kernel(
    inputs: Sequence[tuple[Input, Buffer]], _outputs: Sequence[TensorSpec], params: Params
) -> list[Buffer]:
    """Codes, scales and biases of MLX. params: parts, mode, bits, group_size."""
    how = {key: params[key] for key in ("mode", "bits", "group_size")}
    return ordered(pack_mlx(weight_of(inputs), **how), params)


def pack_bnb8_kernel(
    inputs: Sequence[tuple[Input, Buffer]], _outputs: Sequence[TensorSpec], params: Params
) -> list[Buffer]:
    """Row-wise codes and scales of LLM.int8. params: parts."""
    return ordered(pack_int8_rowwise(weight_of(inputs)), params)
