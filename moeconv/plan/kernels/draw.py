"""Kernels that draw random numbers: router rows, noise on copies, and the redrawn neurons of Drop-Upcycling.

Each draw has its own Philox generator, keyed by (seed, purpose, layer, expert, matrix). The bytes therefore do not
depend on the order of the work, on the number of workers, or on whether a run was resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from moeconv.checkpoint.header import tensor_nbytes
from moeconv.plan.kernels import Buffer
from moeconv.plan.kernels.arrays import from_float, to_float32
from moeconv.plan.plan import Input, Params, TensorSpec
from moeconv.randomness import generator

_BLOCK = 1 << 18  # elements in float32 at a time

Place = tuple[slice | np.ndarray, slice | np.ndarray]  # an index into a block of rows


def draw_normal(_inputs: Sequence[tuple[Input, Buffer]], outputs: Sequence[TensorSpec], params: Params) -> list[Buffer]:
    """N(0, std) in the shape of the output, for the rows of a router. params: key, std; repeat (1): adjacent copies of
    each row."""
    (spec,) = outputs
    repeat = params.get("repeat", 1)
    shape = (spec.shape[0] // repeat, *spec.shape[1:])
    drawn = generator(params["key"]).standard_normal(shape, np.float32) * params["std"]
    return [from_float(np.repeat(drawn, repeat, axis=0), spec.dtype)]


def add_noise(inputs: Sequence[tuple[Input, Buffer]], outputs: Sequence[TensorSpec], params: Params) -> list[Buffer]:
    """A copy with N(0, scale * std(W)) added to the chosen neurons. params: key, scale, neurons_key, fraction, axis.

    Sparse Upcycling (Komatsuzaki et al. 2022, arXiv 2212.05055) adds noise to break the symmetry of copies.
    """
    ((ref, data),) = inputs
    everything = np.arange(ref.shape[params["axis"]])
    _, std = _moments(ref, data, everything, params["axis"])
    draw = generator(params["key"])

    def noisy(values: np.ndarray) -> np.ndarray:
        noise = draw.standard_normal(values.shape, np.float32) * np.float32(std * params["scale"])
        changed: np.ndarray = values + noise
        return changed

    return [_edit(ref, data, outputs[0].dtype, params, noisy)]


def redraw_neurons(
    inputs: Sequence[tuple[Input, Buffer]], outputs: Sequence[TensorSpec], params: Params
) -> list[Buffer]:
    """A copy whose chosen neurons are redrawn from N(mean, std) of the values that they replace.

    Drop-Upcycling (arXiv 2502.19261). `neurons_key` decides the neurons, which are the same in the gate, up and down of
    an expert. params: key, neurons_key, fraction, axis (of the neurons: 0 in gate and up, 1 in down).
    """
    ((ref, data),) = inputs
    chosen = choose_neurons(params["neurons_key"], ref.shape[params["axis"]], params["fraction"])
    mean, std = _moments(ref, data, chosen, params["axis"])
    draw = generator(params["key"])

    def redrawn(values: np.ndarray) -> np.ndarray:
        drawn: np.ndarray = draw.standard_normal(values.shape, np.float32) * np.float32(std) + np.float32(mean)
        return drawn

    return [_edit(ref, data, outputs[0].dtype, params, redrawn)]


def _row_blocks(ref: Input, data: Buffer) -> Iterator[tuple[slice, np.ndarray]]:
    """(byte range, float32 rows) of a matrix, a few rows at a time, so that temporaries stay small for any size."""
    row = ref.nbytes // ref.shape[0]
    step = max(1, _BLOCK // max(1, ref.shape[1]))
    view = memoryview(data)
    for first in range(0, ref.shape[0], step):
        count = min(step, ref.shape[0] - first)
        where = slice(first * row, (first + count) * row)
        yield where, to_float32(view[where], ref.dtype, (count, ref.shape[1]))


def _moments(ref: Input, data: Buffer, chosen: np.ndarray, axis: int) -> tuple[float, float]:
    """Mean and standard deviation of the chosen neurons' values, accumulated in float64."""
    total = square = 0.0
    row = 0
    for _, values in _row_blocks(ref, data):
        part = _chosen_part(values, row, chosen, axis)[1]
        total += float(part.sum(dtype=np.float64))
        square += float(np.square(part, dtype=np.float64).sum())
        row += len(values)
    count = len(chosen) * ref.shape[1 - axis]
    mean = total / count if count else 0.0
    return mean, max(0.0, square / count - mean * mean) ** 0.5 if count else 0.0


def _chosen_part(values: np.ndarray, first: int, chosen: np.ndarray, axis: int) -> tuple[Place, np.ndarray]:
    """(index, values) of the chosen neurons within a block of rows that starts at row `first`."""
    if axis == 1:
        return (slice(None), chosen), values[:, chosen]
    inside = chosen[(chosen >= first) & (chosen < first + len(values))] - first
    return (inside, slice(None)), values[inside]


def _edit(
    ref: Input, data: Buffer, dtype: str, params: Params, change: Callable[[np.ndarray], np.ndarray]
) -> bytearray:
    """A copy in which `change` was applied to the values of the chosen neurons, block by block in the order of rows."""
    chosen = choose_neurons(params["neurons_key"], ref.shape[params["axis"]], params["fraction"])
    result = bytearray(tensor_nbytes(dtype, ref.shape))
    row = done = 0
    for where, values in _row_blocks(ref, data):
        place, part = _chosen_part(values, row, chosen, params["axis"])
        if dtype == ref.dtype and not part.size:
            made = memoryview(data)[where]
        else:
            values[place] = change(part)
            made = from_float(values, dtype)
        result[done : done + len(made)] = made
        done += len(made)
        row += len(values)
    return result


def choose_neurons(key: Sequence[object], width: int, fraction: float) -> np.ndarray:
    """Sorted indices of round(fraction * width) neurons out of `width`."""
    return np.sort(generator(key).permutation(width)[: round(fraction * width)])
