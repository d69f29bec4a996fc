"""The kernel that makes the rows of a router whose experts were copied, such that the copies do not tie."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moeconv.plan.kernels import Buffer
from moeconv.plan.kernels.arrays import from_float, to_float32
from moeconv.plan.plan import Input, Params, TensorSpec

_BELOW = 2.0  # a score is at most 1, so that a bias 2 below the smallest one cannot reach any other choice


def copied_rows(inputs: Sequence[tuple[Input, Buffer]], outputs: Sequence[TensorSpec], params: Params) -> list[Buffer]:
    """One entry per new expert of a tensor with one entry per old expert: [E, ...] or [1, E].

    `of` is the old expert of each new one, and `rank` the number of the copy: 0 for the expert itself, whose entry
    keeps its bits. With `by`, the entry of copy r is mean + by^r (entry - mean), where the mean is that of all old
    entries. With `below`, it is 2 less than the smallest of the old entries. Otherwise it is the old entry. With
    `times`, all entries are multiplied by it."""
    ((ref, data),) = inputs
    (spec,) = outputs
    of, rank = np.array(params["of"]), np.array(params["rank"])
    old = to_float32(data, ref.dtype, ref.shape).reshape(params["experts"], -1)
    made = old[of]
    if params.get("below"):
        made[rank > 0] = old.min() - _BELOW
    elif "by" in params:
        mean = old.mean(0, dtype=np.float64)
        moved = mean + np.power(float(params["by"]), rank)[:, None] * (made - mean)
        made[rank > 0] = moved[rank > 0].astype(made.dtype)
    elif "times" in params:
        made = made * np.float32(params["times"])
    return [from_float(made.reshape(spec.shape), spec.dtype)]
