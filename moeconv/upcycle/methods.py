"""Upcycling methods: how one FFN matrix becomes the matrices of E experts. A method is one function over kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moeconv.checkpoint.reader import TensorRef
from moeconv.families.spec import Role
from moeconv.options import UpcycleOptions
from moeconv.plan.build import carry, whole
from moeconv.plan.plan import Item, TensorSpec


@dataclass(frozen=True, slots=True)
class Matrix:
    """One expert's matrix to be made: where it comes from and goes to. `axis` is the neurons' axis."""

    ref: TensorRef
    role: Role
    name: str
    dtype: str | None
    seed: int

    @property
    def axis(self) -> int:
        return 1 if self.role.key.endswith(".down") else 0


@dataclass(frozen=True, slots=True)
class Method:
    """A method's planner for one matrix of one expert; `exact` where the model's function does not change."""

    make: Callable[[Matrix, UpcycleOptions], Item]
    exact: bool


def _copy(matrix: Matrix, options: UpcycleOptions) -> Item:
    return carry(matrix.ref, role=matrix.role.key, name=matrix.name, dtype=matrix.dtype, changed="expert")


def _drawn(matrix: Matrix, kernel: str, purpose: str, **params: Any) -> Item:
    layer, expert = matrix.role.layer, matrix.role.expert
    spec = TensorSpec(
        matrix.name, matrix.dtype or matrix.ref.dtype, matrix.ref.shape, matrix.role.key,
        matrix.ref.shape[0] * matrix.ref.shape[1],
    )  # fmt: skip
    keys = {
        "key": [matrix.seed, purpose, layer, expert, matrix.role.key],
        "neurons_key": [matrix.seed, purpose, layer, expert],  # one set of neurons for gate, up and down
        "axis": matrix.axis,
    }
    return Item((spec,), kernel, (whole(matrix.ref),), keys | params, "expert")


def _noise(matrix: Matrix, options: UpcycleOptions) -> Item:
    return _drawn(matrix, "add_noise", "noise", scale=options.noise_scale, fraction=options.noise_fraction)


def _drop(matrix: Matrix, options: UpcycleOptions) -> Item:
    return _drawn(matrix, "redraw_neurons", "drop", fraction=options.drop_ratio)


METHODS: dict[str, Method] = {
    "copy": Method(_copy, exact=True),
    "noise": Method(_noise, exact=False),
    "drop": Method(_drop, exact=False),
}
