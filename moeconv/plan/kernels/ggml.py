"""The kernel of GGUF tensors: a weight in a float dtype or a block dtype."""

from __future__ import annotations

from collections.abc import Sequence

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
