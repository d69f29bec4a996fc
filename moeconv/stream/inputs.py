"""What the matrices of a layer read while it runs: the inputs of ordinary modules, and those of every expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from moeconv.errors import InputError
from moeconv.stream.experts import down_inputs
from moeconv.stream.layer import Batch, Layer
from moeconv.stream.layers import LayerStream

_ROWS = 1024  # pairs of token and expert that are collected at a time


@dataclass(frozen=True)
class InputMatrix:
    """A matrix whose inputs are collected: its name, columns, experts (1 for an ordinary matrix), the key of its role,
    and the name on disk of the tensor that it is made from."""

    name: str
    columns: int
    experts: int
    key: str
    source: str


class Collected(Protocol):
    """What is kept of inputs, per expert."""

    def add(self, rows: Tensor) -> None:
        """Rows [..., columns] of an ordinary matrix."""

    def add_each(self, rows: Tensor, expert: Tensor) -> None:
        """Rows [n, columns], each of its expert [n]."""


Kept = TypeVar("Kept", bound=Collected)
Matrix = TypeVar("Matrix", bound=InputMatrix)


def layer_inputs(
    stream: LayerStream, layer: Layer, matrices: Sequence[Matrix], new: Callable[[int, int, int], Kept]
) -> Iterator[tuple[Matrix, Kept]]:
    """Run a layer; yield each matrix with what was collected of its inputs. `new(experts, columns, layer)` makes an
    empty collection. The matrices of experts that read the same share one. Raises InputError where the class does not
    show what the down projections read."""
    seen: dict[str, Kept] = {}
    alone = [m for m in matrices if m.experts == 1]
    routed = [m for m in matrices if m.experts > 1]
    with ExitStack() as stack, torch.no_grad():
        for one in alone:
            module = stream.skeleton.owner(one.source)
            total = seen[one.name] = new(1, one.columns, layer.index)
            stack.callback(module.register_forward_pre_hook(partial(_on_input, total)).remove)
        pools = {key: new(of[0].experts, of[0].columns, layer.index) for key, of in _by_input(routed).items()}
        for batch in layer.batches():
            if routed:
                _add_routed(layer, batch, pools)
            del batch
    for one in matrices:
        yield one, seen[one.name] if one.experts == 1 else pools[_input_of(one)]


def _on_input(total: Collected, _module: nn.Module, given: tuple[object, ...]) -> None:
    if given and isinstance(given[0], Tensor):
        total.add(given[0])


def _input_of(one: InputMatrix) -> str:
    """What an expert's matrix reads: the token, or the hidden activations."""
    return "down" if one.key == "expert.down" else "token"


def _by_input(routed: Sequence[Matrix]) -> dict[str, list[Matrix]]:
    found: dict[str, list[Matrix]] = {}
    for one in routed:
        found.setdefault(_input_of(one), []).append(one)
    return found


def _add_routed(layer: Layer, batch: Batch, pools: Mapping[str, Collected]) -> None:
    index, weights = batch.top_k_index, batch.top_k_weights
    assert index is not None and weights is not None and layer.experts is not None
    hidden = batch.expert_input
    expert, order = index.reshape(-1).sort(stable=True)
    token = order // index.shape[1]
    by = weights.reshape(-1)[order] if layer.top_k_on_input else None
    for start in range(0, len(token) if "token" in pools else 0, _ROWS):
        rows = slice(start, start + _ROWS)
        given = hidden[token[rows]]
        pools["token"].add_each(given if by is None else given * by[rows, None], expert[rows])
    try:
        for rows, made in down_inputs(layer.experts, hidden, token, expert, weights=by) if "down" in pools else ():
            pools["down"].add_each(made, expert[rows])
    except InputError as error:
        raise InputError(
            f"the inputs of the down projections of {type(layer.experts).__name__} are not seen in its class",
            hint="Quantize this family without what is measured of these inputs.",
        ) from error
