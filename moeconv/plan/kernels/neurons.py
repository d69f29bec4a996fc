"""The kernel that keeps some neurons of an FFN, or of several experts in one tensor: it only moves their bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moeconv.checkpoint.header import tensor_nbytes
from moeconv.errors import InputError
from moeconv.plan.kernels import Buffer
from moeconv.plan.kernels.arrays import from_float, raw_bytes, to_float32
from moeconv.plan.plan import Input, Params, TensorSpec

_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def pick_neurons(inputs: Sequence[tuple[Input, Buffer]], outputs: Sequence[TensorSpec], params: Params) -> list[Buffer]:
    """The neurons of each expert that the first input I32 [n, W] lists, of the other inputs, which are together [n,
    before, size, after]; params: before, size and after. With `new` in params there is no such input: all neurons are
    kept, and neurons of zeros follow up to `new`. The output may have another float dtype."""
    (spec,) = outputs
    indexed = "new" not in params
    parts = inputs[1:] if indexed else inputs
    dtype = parts[0][0].dtype
    kind = _BITS[tensor_nbytes(dtype, (1,))]
    data = np.frombuffer(b"".join(of_one for _, of_one in parts) if len(parts) > 1 else parts[0][1], kind)
    data = data.reshape(-1, params["before"], params["size"], params["after"])
    if indexed:
        chosen = np.frombuffer(inputs[0][1], np.int32).reshape(len(data), -1)
        if chosen.size and not 0 <= chosen.min() <= chosen.max() < params["size"]:
            raise InputError(
                f"the measured choice names neuron {chosen.max()}, but the FFN has {params['size']} neurons",
                hint="The measurement belongs to another model. Measure again on this one.",
            )
        made = np.empty((len(data), params["before"], chosen.shape[1], params["after"]), kind)
        for i, of_one in enumerate(chosen):
            np.take(data[i], of_one, axis=1, out=made[i], mode="clip")
    else:
        made = np.zeros((len(data), params["before"], params["new"], params["after"]), kind)
        made[:, :, : params["size"]] = data
    if spec.dtype == dtype:
        return [raw_bytes(made)]
    return [from_float(to_float32(raw_bytes(made), dtype, made.shape), spec.dtype)]
