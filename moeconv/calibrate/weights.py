"""Measures of experts that need only their weights and no data, computed expert by expert with numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from moeconv.checkpoint.header import DTYPE_BITS, FLOAT_DTYPES
from moeconv.errors import InputError, escape
from moeconv.families.model import Model
from moeconv.families.packed import SHARED, weight_of
from moeconv.families.spec import FFN_PARTS
from moeconv.matching import assignment
from moeconv.plan.build import rows, whole
from moeconv.plan.kernels.arrays import to_float32
from moeconv.plan.plan import Input

_BLOCK = 1 << 20  # elements converted at a time


def measure_experts(
    model: Model, measure: Callable[[StoredExpertWeights], float], *, jobs: int = 1
) -> dict[int, np.ndarray]:  # fmt: skip
    """{layer: float64 [E]} of `measure` for every expert of every MoE layer. Quantized weights are decoded.

    Raises InputError for weights of a dtype that is not a floating-point type, and for NaN and infinite weights.
    """
    for name, role in model.roles.items():
        if role.group == "expert" and not role.part and model.checkpoint.tensors[name].dtype not in FLOAT_DTYPES:
            raise InputError(
                f"tensor {escape(name)!r} is {model.checkpoint.tensors[name].dtype}, not a floating-point type",
                hint="Prune the unquantized checkpoint.",
            )
    pairs = [(layer, expert) for layer in model.moe_layers for expert in range(model.num_experts)]
    matrices = _matrices(model)
    with ThreadPoolExecutor(jobs) as pool:
        scores = list(pool.map(lambda at: measure(StoredExpertWeights(model, at[0], at[1], matrices[at])), pairs))
    return {
        layer: np.array([s for (at, _), s in zip(pairs, scores) if at == layer], np.float64)
        for layer in model.moe_layers
    }


Parts = dict[str, Input]  # part of a stored weight -> its bytes


def _matrices(model: Model) -> dict[tuple[int, int], dict[str, Parts]]:
    """{(layer, expert): its matrices by the name of their weight}: tensors of its own, or its rows of packed
    tensors."""
    found: dict[tuple[int, int], dict[str, Parts]] = {}
    for name, role in model.roles.items():
        if role.group != "expert" or role.layer is None or role.key.endswith("_bias"):
            continue
        ref = model.checkpoint.tensors[name]
        stem = weight_of(name) if role.part else name
        for expert in range(model.num_experts) if role.expert is None else (role.expert,):
            where = whole(ref) if role.expert is not None or role.part in SHARED else rows(ref, expert, 1)
            found.setdefault((role.layer, expert), {}).setdefault(stem, {})[role.part or "weight"] = where
    return found


@dataclass(frozen=True)
class StoredExpertWeights:
    """The matrices of one expert, {name of the weight: its parts}. They are read when they are asked for."""

    model: Model
    layer: int
    expert: int
    matrices: Mapping[str, Parts]

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (number of the matrix, a block of its values in order, float32 [n]). A quantized matrix is one
        block."""
        for i, (name, parts) in enumerate(self.matrices.items()):
            for values in _values(self.model, name, parts):
                if not np.isfinite(values).all():
                    raise InputError(
                        f"expert {self.expert} of layer {self.layer} has NaN or infinite values in {escape(name)}",
                        hint="The checkpoint is damaged: download it again.",
                    )
                yield i, values

    def sums(self) -> np.ndarray:
        """float64 [matrices, 3]: for every matrix the sum of |W|, the sum of W^2, and the number of values."""
        sums = np.zeros((len(self.matrices), 3))
        for i, values in self.blocks():
            absolute, square = np.abs(values).sum(dtype=np.float64), np.square(values, dtype=np.float64).sum()
            sums[i] += float(absolute), float(square), len(values)
        return sums


def _values(model: Model, name: str, parts: Parts) -> Iterator[np.ndarray]:
    """Yield the values of a matrix in float32, block by block. A quantized matrix is decoded as one block."""
    stored = model.stored.get(name)
    if stored is None:
        (ref,) = parts.values()
        size = DTYPE_BITS[ref.dtype] // 8
        for start in range(ref.start, ref.start + ref.nbytes, _BLOCK * size):
            length = min(_BLOCK * size, ref.start + ref.nbytes - start)
            data = model.checkpoint.read(ref.tensor, start=start, length=length)
            yield to_float32(data, ref.dtype, (length // size,))
        return
    from moeconv.plan.kernels.decode import decode_parts
    from moeconv.plan.kernels.stored import to_tensor

    read = {
        part: to_tensor(model.checkpoint.read(ref.tensor, start=ref.start, length=ref.nbytes), ref.dtype, ref.shape)
        for part, ref in parts.items()
    }
    yield decode_parts(read, name=name, how=stored.how).float().numpy().reshape(-1)


# -- similarity of weights -------------------------------------------------------------------------------------------


def weight_cosine(model: Model, *, aligned: bool, jobs: int = 1) -> dict[int, np.ndarray]:
    """{layer: float64 [E, E]} of the cosines of every two experts' weights: of the matrices as they are or, with
    `aligned`, after the neurons of one expert are matched to those of the other by the assignment that maximises the
    cosine. A neuron is its gate row, up row and down column, each in units of the root mean square of its matrix."""
    return {layer: _layer_cosine(model, layer, aligned=aligned, jobs=jobs) for layer in model.moe_layers}


def _layer_cosine(model: Model, layer: int, *, aligned: bool, jobs: int) -> np.ndarray:
    experts = model.num_experts
    with ThreadPoolExecutor(jobs) as pool:
        neurons = list(pool.map(lambda e: _neurons(model, layer, e), range(experts)))
        cosine = np.eye(experts)
        pairs = [(a, b) for a in range(experts) for b in range(a)]

        def compare(pair: tuple[int, int]) -> float:
            one, other = neurons[pair[0]], neurons[pair[1]]
            scale = float(np.linalg.norm(one) * np.linalg.norm(other)) or 1.0
            if not aligned:
                return float((one * other).sum(dtype=np.float64)) / scale
            products = one @ other.T
            return float(products[assignment(products)].sum(dtype=np.float64)) / scale

        for (a, b), value in zip(pairs, pool.map(compare, pairs)):
            cosine[a, b] = cosine[b, a] = value
    return np.clip(cosine, -1, 1)


def _neurons(model: Model, layer: int, expert: int) -> np.ndarray:
    """float32 [I, 3H]: gate row, up row and down column of each neuron, each in units of its matrix' root mean
    square."""
    parts = []
    for part in FFN_PARTS:
        values = _matrix(model, model.expert_name(part, layer=layer, expert=expert))
        values = values / (float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))) or 1.0)
        parts.append(values.T if part == "down" else values)
    return np.concatenate(parts, axis=1).astype(np.float32)


def _matrix(model: Model, name: str) -> np.ndarray:
    """A weight in float32; a quantized one is decoded."""
    if not model.quantization:
        ref = model.checkpoint.tensors[name]
        return to_float32(model.checkpoint.read(name), ref.dtype, ref.shape)
    from moeconv.tensors import decode_weight

    return decode_weight(model, name).float().numpy()
