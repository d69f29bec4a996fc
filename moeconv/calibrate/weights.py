"""Measures of experts that need only their weights, no data: read once, an expert at a time, in numpy."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from moeconv.checkpoint.header import FLOAT_DTYPES
from moeconv.errors import InputError, escape
from moeconv.families.model import Model
from moeconv.families.spec import FFN_PARTS
from moeconv.plan.kernels.arrays import to_float32

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
    with ThreadPoolExecutor(jobs) as pool:
        scores = list(pool.map(lambda pair: _aimer_of(model, *pair), pairs))
    return {
        layer: np.array([s for (at, _), s in zip(pairs, scores) if at == layer], np.float64)
        for layer in model.moe_layers
    }


def _aimer_of(model: Model, layer: int, expert: int) -> float:
    absolute = square = 0.0
    count = 0
    for part in FFN_PARTS:
        ref = model.checkpoint.tensors[model.expert_name(part, layer=layer, expert=expert)]
        size = ref.nbytes // max(1, int(np.prod(ref.shape)))
        for start in range(0, ref.nbytes, _BLOCK * size):
            length = min(_BLOCK * size, ref.nbytes - start)
            data = model.checkpoint.read(ref.name, start=start, length=length)
            values = to_float32(data, ref.dtype, (length // size,))
            absolute += float(np.abs(values).sum(dtype=np.float64))
            square += float(np.square(values, dtype=np.float64).sum())
            count += len(values)
    if not np.isfinite(square):
        raise InputError(
            f"expert {expert} of layer {layer} holds NaN or infinite values in {escape(ref.name)}",
            hint="The checkpoint is damaged.",
        )
    return absolute / count / np.sqrt(square / count) if square else 1.0
