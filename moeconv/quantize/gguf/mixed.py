"""--scheme mixed for GGUF: a type for every tensor of the experts, by the importance of its layer and by its role.

In a GGUF file the experts of a layer are one tensor per projection, and any tensor may have any type. The least sum of
importance times error within the budget is that of `quantize.budget.allocate`, over tensors instead of layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moeconv.checkpoint.header import tensor_nbytes
from moeconv.quantize.budget import allocate
from moeconv.quantize.gguf.types import BY_DTYPE, UNUSUAL, fitting

# What a squared relative error of a projection's weights costs in loss, relative to down: fitted to the increases of a
# trained model with other types in each role (benchmarks/roles.py). Its output error alone would say gate .27, up .12.
SENSITIVITY: Mapping[str, float] = {"expert.gate": 1.2, "expert.up": 0.82, "expert.down": 1.0}
# the mixes: the types that have no other type with fewer bytes and less error
MIXES = ("q2_k", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0")
AMONG = ("q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "mxfp4")  # others that --among may name


@dataclass(frozen=True, slots=True)
class MixedTensor:
    """A tensor of the file whose type is chosen: its name, layer, key and row-major shape."""

    name: str
    layer: int
    key: str
    shape: tuple[int, ...]

    def options(self, dtypes: Sequence[str], importance: float) -> dict[str, tuple[int, float]]:
        """(bytes, error times importance) of each type that it may have, by dtype: those of `dtypes`, or what stands in
        for them where their blocks do not divide the width."""
        weighted = importance * SENSITIVITY.get(self.key, 1.0)
        fits = dict.fromkeys(fitting(dtype, self.shape[-1]) for dtype in dtypes)
        return {
            dtype: (tensor_nbytes(dtype, self.shape), weighted * BY_DTYPE[dtype].error ** 2)
            for dtype in fits
            if dtype != UNUSUAL
        }


@dataclass(frozen=True, slots=True)
class MixedTypes:
    """The dtypes that were chosen, by the names of the tensors; None where even the smallest are above the budget.
    `least` is the number of bytes that the smallest take."""

    chosen: Mapping[str, str] | None
    least: int


def choose_types(
    tensors: Sequence[MixedTensor], dtypes: Sequence[str], importance: Mapping[int, float], budget: int
) -> MixedTypes:
    """The types of the tensors, out of `dtypes`, with the least sum of error times importance within `budget` bytes.
    Every tensor must have a width that the blocks of 32 divide."""
    total = sum(importance.values()) or 1.0
    options = [tensor.options(dtypes, importance[tensor.layer] / total) for tensor in tensors]
    least = sum(min(size for size, _ in of.values()) for of in options)
    picked = allocate([list(of.values()) for of in options], budget)
    if picked is None:
        return MixedTypes(None, least)
    return MixedTypes({t.name: list(of)[i] for t, of, i in zip(tensors, options, picked, strict=True)}, least)
