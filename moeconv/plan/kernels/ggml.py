"""The kernel of GGUF tensors: a weight in a float dtype or a block dtype."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moeconv.checkpoint.header import BLOCK_DTYPES
from moeconv.plan.kernels import Buffer
from moeconv.plan.kernels.arrays import from_float, to_float32
from moeconv.plan.plan import Input, Params, TensorSpec


def gguf_kernel(inputs: Sequence[tuple[Input, Buffer]], outputs: Sequence[TensorSpec], _params: Params) -> list[Buffer]:
    """Encode a weight; the second input, if there is one, is the importance of its columns in float32."""
    (ref, data), *importance = inputs
    (spec,) = outputs
    if spec.dtype not in BLOCK_DTYPES:
        return [from_float(to_float32(data, ref.dtype, ref.shape), spec.dtype)]
    import torch

    from moeconv.plan.kernels.pack.ggml import encode
    from moeconv.plan.kernels.stored import to_tensor

    torch.set_num_threads(1)  # items already run in parallel
    weight = to_tensor(memoryview(data), ref.dtype, ref.shape)
    columns = [to_tensor(memoryview(part), by.dtype, by.shape) for by, part in importance]
    return [encode(weight, spec.dtype, *columns)]


def from_gguf_kernel(
    inputs: Sequence[tuple[Input, Buffer]], outputs: Sequence[TensorSpec], params: Params
) -> list[Buffer]:
    """Decode a tensor of a GGUF file. `params["order"]`, an expression on the row numbers [rows, 1], says which row of
    the checkpoint is at each row of the file; the rows are put back."""
    from moeconv.plan.kernels.layout import compute

    ((ref, data),), (spec,) = inputs, outputs
    values = _decoded(data, ref.dtype, ref.shape)
    if order := params.get("order"):
        numbers = np.arange(ref.shape[0], dtype=np.float32)
        given = Input("rows", "F32", (ref.shape[0], 1), 0, numbers.nbytes)
        there = TensorSpec("rows", "F32", (ref.shape[0], 1), "", ref.shape[0])
        (moved,) = compute([(given, numbers.tobytes())], [there], {"tree": order})
        rows = np.frombuffer(moved, np.float32).astype(np.int64)
        back = np.empty_like(values)
        back[rows] = values
        values = back
    return [from_float(values, spec.dtype)]


def _decoded(data: Buffer, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    if dtype not in BLOCK_DTYPES:
        return to_float32(data, dtype, shape)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    elements, size = BLOCK_DTYPES[dtype]
    octets = np.frombuffer(data, np.uint8).reshape(-1, shape[-1] // elements * size)
    decoded: np.ndarray = dequantize(octets, GGMLQuantizationType[dtype]).reshape(shape)
    return decoded
