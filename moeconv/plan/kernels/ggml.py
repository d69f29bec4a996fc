"""The kernel of GGUF tensors: the rows of a weight in llama.cpp's order, in a float dtype or a block dtype."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moeconv.checkpoint.header import BLOCK_DTYPES
from moeconv.plan.kernels import Buffer
from moeconv.plan.kernels.arrays import from_float, to_float32
from moeconv.plan.plan import Input, Params, TensorSpec


def gguf_kernel(inputs: Sequence[tuple[Input, Buffer]], outputs: Sequence[TensorSpec], params: Params) -> list[Buffer]:
    """Encode a weight. params: heads, the number of heads whose rows are reordered from halves to pairs (the rotary
    order of llama.cpp for llama); 0 for no change."""
    ((ref, data),), (spec,) = inputs, outputs
    if spec.dtype not in BLOCK_DTYPES:
        weight = to_float32(data, ref.dtype, ref.shape)
        return [from_float(interleave(weight, params["heads"]) if params["heads"] else weight, spec.dtype)]
    import torch

    from moeconv.plan.kernels.pack.ggml import encode
    from moeconv.plan.kernels.stored import to_tensor

    torch.set_num_threads(1)  # items already run in parallel
    if params["heads"]:
        turned = interleave(to_float32(data, ref.dtype, ref.shape), params["heads"])
        return [encode(torch.from_numpy(np.ascontiguousarray(turned, np.float32)), spec.dtype)]
    return [encode(to_tensor(memoryview(data), ref.dtype, ref.shape), spec.dtype)]


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """`weight` [rows, ...] or bias [rows], where the rows 0..d/2-1 and d/2..d-1 of each of the `heads` heads, of d rows
    each, alternate."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
