"""Kernels that draw random numbers: router rows, noise on copies, Drop-Upcycling's redrawn neurons.

Each draw has its own Philox generator, keyed by (seed, purpose, layer, expert, matrix), so bytes do not depend on
the order of work, the number of workers or where a run resumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moeconv.plan.kernels import Buffer
from moeconv.plan.kernels.arrays import from_float, to_float32
from moeconv.plan.plan import Input, TensorSpec


def generator(key: Sequence[Any]) -> np.random.Generator:
    """A numpy generator that only `key` (numbers and words) decides."""
    digest = hashlib.sha256(repr(tuple(key)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], np.uint64)))


def draw_normal(inputs: Sequence[tuple[Input, Buffer]], outputs: Sequence[TensorSpec], params: Mapping[str, Any]):
    """N(0, std) of the output's shape: a router's rows. params: key, std."""
    (spec,) = outputs
    return [from_float(generator(params["key"]).standard_normal(spec.shape, np.float32) * params["std"], spec.dtype)]


def add_noise(inputs: Sequence[tuple[Input, Buffer]], outputs: Sequence[TensorSpec], params: Mapping[str, Any]):
    """A copy with N(0, scale * std(W)) added to the chosen neurons. params: key, scale, neurons_key, fraction, axis.

    Sparse Upcycling (Komatsuzaki et al. 2022, arXiv 2212.05055) adds noise to break the symmetry of copies.
    """
    ((ref, data),) = inputs
    weight = to_float32(data, ref.dtype, ref.shape)
    axis = params["axis"]
    chosen = choose_neurons(params["neurons_key"], weight.shape[axis], params["fraction"])
    std = float(weight.std(dtype=np.float64)) * params["scale"]
    shape = (len(chosen), ref.shape[1]) if axis == 0 else (ref.shape[0], len(chosen))
    noise = generator(params["key"]).standard_normal(shape, np.float32) * np.float32(std)
    if axis == 0:
        weight[chosen] += noise
    else:
        weight[:, chosen] += noise
    return [from_float(weight, outputs[0].dtype)]


def redraw_neurons(inputs: Sequence[tuple[Input, Buffer]], outputs: Sequence[TensorSpec], params: Mapping[str, Any]):
    """A copy whose chosen neurons are redrawn from N(mean, std) of the values that they replace.

    Drop-Upcycling (arXiv 2502.19261), with one set of neurons for an expert's gate, up and down, which `neurons_key`
    decides. params: key, neurons_key, fraction, axis (the neurons' axis: 0 in gate and up, 1 in down).
    """
    ((ref, data),) = inputs
    weight = to_float32(data, ref.dtype, ref.shape)
    axis = params["axis"]
    chosen = choose_neurons(params["neurons_key"], weight.shape[axis], params["fraction"])
    if len(chosen):
        old = weight[chosen] if axis == 0 else weight[:, chosen]
        mean, std = np.float32(old.mean(dtype=np.float64)), np.float32(old.std(dtype=np.float64))
        new = generator(params["key"]).standard_normal(old.shape, np.float32) * std + mean
        if axis == 0:
            weight[chosen] = new
        else:
            weight[:, chosen] = new
    return [from_float(weight, outputs[0].dtype)]


def choose_neurons(key: Sequence[Any], width: int, fraction: float) -> np.ndarray:
    """Sorted indices of round(fraction * width) neurons out of `width`."""
    return np.sort(generator(key).permutation(width)[: round(fraction * width)])
