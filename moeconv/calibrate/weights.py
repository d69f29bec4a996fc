"""Measures of experts that need only their weights, no data: read once, an expert at a time, in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from moeconv.checkpoint.header import DTYPE_BITS, FLOAT_DTYPES
from moeconv.errors import InputError, escape
from moeconv.families.model import Model
from moeconv.plan.build import rows, whole
from moeconv.plan.kernels.arrays import to_float32
from moeconv.plan.plan import Input

_BLOCK = 1 << 20  # elements converted at a time


def aimer(model: Model, *, jobs: int = 1) -> dict[int, np.ndarray]:
    """AIMER's score of every expert, {layer: float64 [E]}: mean|W| / sqrt(mean W^2) over gate, up and down.

    High means spread evenly, which the criterion takes for dispensable. Raises InputError for packed weights.
    """
    if model.quantization:
        raise InputError("aimer reads plain weights; this checkpoint is quantized", hint="Prune before you quantize.")
    for name, role in model.roles.items():
        if role.group == "expert" and model.checkpoint.tensors[name].dtype not in FLOAT_DTYPES:
            raise InputError(
                f"tensor {escape(name)!r} is {model.checkpoint.tensors[name].dtype}: aimer reads floating weights",
                hint="Prune the unquantized checkpoint.",
            )
    pairs = [(layer, expert) for layer in model.moe_layers for expert in range(model.num_experts)]
    matrices = _matrices(model)
    with ThreadPoolExecutor(jobs) as pool:
        scores = list(pool.map(lambda pair: _aimer_of(model, matrices[pair], *pair), pairs))
    return {
        layer: np.array([s for (at, _), s in zip(pairs, scores) if at == layer], np.float64)
        for layer in model.moe_layers
    }


def _matrices(model: Model) -> dict[tuple[int, int], list[Input]]:
    """Where the matrices of each (layer, expert) lie: tensors of its own, or its share of those of all experts."""
    found: dict[tuple[int, int], list[Input]] = {}
    for name, role in model.roles.items():
        if role.group != "expert" or role.layer is None or role.key.endswith("_bias"):
            continue
        ref = model.checkpoint.tensors[name]
        if role.expert is not None:
            found.setdefault((role.layer, role.expert), []).append(whole(ref))
            continue
        for expert in range(model.num_experts):
            found.setdefault((role.layer, expert), []).append(rows(ref, expert, 1))
    return found


def _aimer_of(model: Model, refs: Sequence[Input], layer: int, expert: int) -> float:
    absolute = square = 0.0
    count = 0
    for ref in refs:
        size = DTYPE_BITS[ref.dtype] // 8
        for start in range(ref.start, ref.start + ref.nbytes, _BLOCK * size):
            length = min(_BLOCK * size, ref.start + ref.nbytes - start)
            data = model.checkpoint.read(ref.tensor, start=start, length=length)
            values = to_float32(data, ref.dtype, (length // size,))
            absolute += float(np.abs(values).sum(dtype=np.float64))
            square += float(np.square(values, dtype=np.float64).sum())
            count += len(values)
    if not np.isfinite(square):
        raise InputError(
            f"expert {expert} of layer {layer} holds NaN or infinite values in {escape(ref.tensor)}",
            hint="The checkpoint is damaged.",
        )
    return absolute / count / np.sqrt(square / count) if square else 1.0
