"""Upcycling methods: how one FFN matrix becomes an expert's matrix. A method is one function over expressions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moeconv.families.node import Node
from moeconv.options import UpcycleOptions


@dataclass(frozen=True, slots=True)
class Matrix:
    """One expert's matrix to be made of the FFN's `node`. `part` is gate, up or down, or one of their biases."""

    node: Node
    part: str
    layer: int
    expert: int
    seed: int

    @property
    def axis(self) -> int:
        """The neurons' axis."""
        return 1 if self.part == "down" else 0


@dataclass(frozen=True, slots=True)
class Method:
    """A method's expression for one matrix of one expert; `exact` where the model's function does not change."""

    make: Callable[[Matrix, UpcycleOptions], Node]
    exact: bool


def _copy(matrix: Matrix, options: UpcycleOptions) -> Node:
    return matrix.node


def _drawn(matrix: Matrix, kernel: str, purpose: str, **params: Any) -> Node:
    if matrix.part.endswith("_bias"):
        return matrix.node
    keys = {
        "key": [matrix.seed, purpose, matrix.layer, matrix.expert, f"expert.{matrix.part}"],
        "neurons_key": [matrix.seed, purpose, matrix.layer, matrix.expert],  # one set of neurons for gate, up and down
        "axis": matrix.axis,
    }
    return Node(kernel, (matrix.node,), keys | params)


def _noise(matrix: Matrix, options: UpcycleOptions) -> Node:
    return _drawn(matrix, "add_noise", "noise", scale=options.noise_scale, fraction=options.noise_fraction)


def _drop(matrix: Matrix, options: UpcycleOptions) -> Node:
    return _drawn(matrix, "redraw_neurons", "drop", fraction=options.drop_ratio)


METHODS: dict[str, Method] = {
    "copy": Method(_copy, exact=True),
    "noise": Method(_noise, exact=False),
    "drop": Method(_drop, exact=False),
}
