"""Kernels that work element by element: cast to another float dtype, fill with a constant, and stated values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moeconv.plan.kernels import Buffer
from moeconv.plan.kernels.arrays import from_float, to_float32
from moeconv.plan.plan import Input, Params, TensorSpec


def cast(inputs: Sequence[tuple[Input, Buffer]], outputs: Sequence[TensorSpec], _params: Params) -> list[Buffer]:
    """The inputs, concatenated, in another float dtype, rounded to nearest even."""
    parts = [to_float32(data, ref.dtype, ref.shape) for ref, data in inputs]
    return [from_float(parts[0] if len(parts) == 1 else np.concatenate(parts), outputs[0].dtype)]


def fill(_inputs: Sequence[tuple[Input, Buffer]], outputs: Sequence[TensorSpec], params: Params) -> list[Buffer]:
    """A tensor of the constant params["value"]."""
    return [from_float(np.full(spec.shape, params["value"], np.float32), spec.dtype) for spec in outputs]


def constant(_inputs: Sequence[tuple[Input, Buffer]], outputs: Sequence[TensorSpec], params: Params) -> list[Buffer]:
    """A tensor of the numbers params["values"]."""
    (spec,) = outputs
    return [from_float(np.array(params["values"], np.float32).reshape(spec.shape), spec.dtype)]
