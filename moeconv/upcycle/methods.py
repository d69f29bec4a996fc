"""Upcycling methods: how the matrix of an FFN becomes that of an expert. A method is a row of functions on
expressions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from moeconv.errors import UsageError
from moeconv.families.node import Node, cut, deal, measured, scale, take
from moeconv.options import UpcycleOptions, flag_of
from moeconv.plan.partition import ROUTER_SCALE
from moeconv.upcycle.cut import Cut, counts


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix of an expert, to be made of the expression `node` for the FFN's. `part` is gate, up or down, or one of
    their biases. `expert` is None for the shared expert. `cut` has the numbers of neurons.
    """

    node: Node
    part: str
    layer: int
    expert: int | None
    seed: int
    cut: Cut

    @property
    def axis(self) -> int | None:
        """The axis of the neurons; None for down_bias, which has no such axis."""
        return None if self.part == "down_bias" else 1 if self.part == "down" else 0


def _range(matrix: Matrix, start: int, stop: int) -> Node:
    if matrix.axis is None or (start, stop) == (0, matrix.cut.ffn):
        return matrix.node
    return cut(matrix.node, axis=matrix.axis, start=start, stop=stop)


def in_order(matrix: Matrix, _options: UpcycleOptions) -> Node:
    """The neurons in the order of the FFN: the shared expert has the first ones, and the pieces of every copy
    follow."""
    if matrix.expert is None:
        return _range(matrix, 0, matrix.cut.shared)
    first = matrix.cut.first(matrix.expert)
    return _range(matrix, first, first + matrix.cut.width)


def shuffled(matrix: Matrix, options: UpcycleOptions) -> Node:
    """Each copy of the routed neurons is shuffled in its own order and then cut (Qwen2 report, arXiv 2407.10671)."""
    if matrix.expert is None or matrix.axis is None:
        return in_order(matrix, options)
    first = 0 if matrix.cut.idle else matrix.cut.shared
    copy, piece = divmod(matrix.expert, matrix.cut.pieces)
    key = [matrix.seed, "shuffle", matrix.layer, copy]
    start = piece * matrix.cut.width
    return deal(_range(matrix, first, matrix.cut.ffn), axis=matrix.axis, key=key, start=start,
                stop=start + matrix.cut.width)  # fmt: skip


def partitioned(matrix: Matrix, _options: UpcycleOptions) -> Node:
    """The neurons that the partition file lists, in its order."""
    if matrix.axis is None:
        return matrix.node
    if matrix.expert is None:
        count, first, which = matrix.cut.shared, 0, "shared"
    else:
        count, first, which = matrix.cut.width, matrix.expert * matrix.cut.width, "experts"
    indices = measured(f"layer.{matrix.layer}.{which}", dtype="I32", shape=(count,), first=first)
    return take(matrix.node, indices, axis=matrix.axis, count=count)


def _fitted(layer: int, options: UpcycleOptions, hidden: int) -> Node:
    """The fitted rows [experts, H], scaled down so far that all chosen experts have the same weight."""
    shape = (counts(options)[0], hidden)
    return scale(measured(f"layer.{layer}.router", dtype="F32", shape=shape), ROUTER_SCALE)


def _always_on(layer: int, options: UpcycleOptions) -> Node:
    """The correction bias [experts]: scores lie between 0 and 1, so that an expert with a bias of 1 is always
    chosen."""
    return measured(f"layer.{layer}.always", dtype="F32", shape=(counts(options)[0],))


def keep(matrix: Matrix, _options: UpcycleOptions) -> Node:
    """The neurons as they are."""
    return matrix.node


@dataclass(frozen=True, slots=True)
class Method:
    """How an FFN becomes experts.

    `select` takes an expert's neurons out of the FFN's matrix. `edit` changes the result, which it finds in
    `matrix.node`; the shared expert is never edited. The routed sum times `scale` is the output of the FFN. `grouped`:
    the pieces of a copy have equal router rows. `router` makes a layer's router rows, in place of random ones, and
    `correction` its correction bias. `exact`: the model's function does not change. `granularity` is the default number
    of pieces. `reads` names the options that only some methods use.

    `partition`: the neurons and the router come from a partition that is measured on the source. `siblings` states
    whether --experts-from may, must or cannot be given ("no"). With siblings, the method `with_siblings` takes the
    place of this one. `undrawn` names the method that makes the same experts without random numbers, "" for this one.

    `idle` has the values of options at which the method edits nothing. `drift` bounds the edits at other values: (share
    of the neurons that change, RMS of the change as a share of the matrix's RMS).
    """

    edit: Callable[[Matrix, UpcycleOptions], Node] = keep
    exact: bool = False
    select: Callable[[Matrix, UpcycleOptions], Node] = in_order
    scale: Callable[[Cut, UpcycleOptions], float] = lambda cut, _options: cut.pieces
    grouped: bool = True
    router: Callable[[int, UpcycleOptions, int], Node] | None = None
    correction: Callable[[int, UpcycleOptions], Node] | None = None
    granularity: int = 1
    reads: tuple[str, ...] = ()
    partition: bool = False
    siblings: Literal["may", "must", "no"] = "may"
    with_siblings: str = ""
    undrawn: str = ""
    idle: Mapping[str, float] = field(default_factory=dict)
    drift: Callable[[UpcycleOptions], tuple[float, float]] | None = None


def _drawn(matrix: Matrix, kernel: str, purpose: str, **params: object) -> Node:
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


_MARGIN = 1.5  # the bound over the expected change, since small matrices scatter


def _redrawn(options: UpcycleOptions) -> tuple[float, float]:
    """Values redrawn with the mean and the deviation of the old ones differ from them by sqrt(2) deviations in RMS."""
    return options.drop_ratio, _MARGIN * math.sqrt(2)


# --method lists them in this order
METHODS: dict[str, Method] = {
    "copy": Method(exact=True, with_siblings="experts-from"),
    "noise": Method(
        _noise,
        reads=("noise_scale", "noise_fraction"),
        idle={"noise_fraction": 0.0},
        drift=lambda options: (
            options.noise_fraction,
            _MARGIN * options.noise_scale * math.sqrt(options.noise_fraction),
        ),
    ),
    "drop": Method(_drop, reads=("drop_ratio",), idle={"drop_ratio": 0.0}, drift=_redrawn),
    "granular": Method(exact=True, granularity=2, siblings="no"),
    "shuffle": Method(
        _drop,
        select=shuffled,
        siblings="no",
        grouped=False,
        granularity=2,
        reads=("drop_ratio",),
        idle={"drop_ratio": 0.0},
        drift=_redrawn,
    ),
    "split": Method(
        select=partitioned,
        partition=True,
        siblings="no",
        scale=lambda cut, _options: cut.top_k,  # each of the chosen weighs 1 / k
        grouped=False,
        router=_fitted,
        correction=_always_on,
        reads=("clustering", "stats"),
    ),
    "experts-from": Method(siblings="must", undrawn="copy"),
}


def which(names: Iterable[str]) -> str:
    """Methods in the words of an error: --method a or b."""
    return f"--method {' or '.join(names)}"


def partitioning() -> list[str]:
    """The names of the methods that need a partition measured on the source."""
    return [name for name, method in METHODS.items() if method.partition]


def check_reads(options: UpcycleOptions) -> None:
    """Raises UsageError for an option that the method does not use."""
    for name in sorted({name for method in METHODS.values() for name in method.reads}):
        if name == "stats" and options.keep_top_k:
            continue
        readers = [known for known, method in METHODS.items() if name in method.reads]
        if getattr(options, name) != getattr(UpcycleOptions(), name) and options.method not in readers:
            raise UsageError(
                f"--method {options.method} does not use {flag_of(name)}",
                hint=f"Leave {flag_of(name)} out; {which(readers)} uses it.",
            )
