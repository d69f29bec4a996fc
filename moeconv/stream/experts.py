"""Experts of a stock experts module, whatever its layout and place: their outputs, activations and down projections."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moeconv.errors import InputError
from moeconv.stream.need import GROUP_ROWS, PAIR_ROWS
from moeconv.stream.products import OnProducts
from moeconv.stream.stored import class_forward, stored_in


def one_expert(forward: Callable[..., Tensor], hidden: Tensor, expert: int, *, like: Tensor | None = None) -> Tensor:
    """Output [n, H] of one expert for `hidden` [n, H], through the stock experts' `forward`, whatever its layout."""
    index = torch.full((len(hidden), 1), expert, dtype=torch.int64, device=hidden.device)
    ones = torch.ones(len(hidden), 1, dtype=like.dtype if like is not None else hidden.dtype, device=hidden.device)
    return forward(hidden, index, ones).reshape(hidden.shape)


def pair_outputs(
    experts: nn.Module, hidden: Tensor, token: Tensor, expert: Tensor, *, dtype: torch.dtype | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, unweighted outputs [m, H]) for the pairs of `token` int64 [n], a row of `hidden` [T, H], and `expert`
    int64 [n], which must ascend: blocks in order. `dtype` is that of the weights that the module takes."""
    step = PAIR_ROWS if stored_in(experts) is None else GROUP_ROWS
    for module, first, rows in _modules(experts, expert):
        forward = class_forward(module)
        for start in range(rows.start, rows.stop, step):
            block = slice(start, min(start + step, rows.stop))
            given = hidden[token[block]]
            ones = torch.ones(len(given), 1, dtype=dtype or hidden.dtype, device=hidden.device)
            yield block, forward(given, expert[block, None] - first, ones).reshape(given.shape)


def _modules(experts: nn.Module, expert: Tensor) -> Iterator[tuple[nn.Module, int, slice]]:
    """(module, its first expert, the rows of `expert` that are its) that hold weights in the computation's dtype."""
    stored = stored_in(experts)
    if stored is None:
        yield experts, 0, slice(0, len(expert))
        return
    for first, stop, rows in stored.pairs(expert):
        yield stored.module(first, stop), first, rows


def activations(experts: nn.Module, hidden: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """What an expert's down projection reads, [n, I], and the expert's output [n, H], for `hidden` [n, H]."""
    module, at = _alone(experts, expert)
    last: Tensor | None = None

    def seen(factors: Sequence[Any], product: Tensor) -> Tensor:
        nonlocal last
        last = factors[0]
        return product

    with OnProducts(seen):
        output = one_expert(class_forward(module), hidden, at)
    width = _down(module, at).shape[1]
    if last is None or last.shape != (len(hidden), width):
        raise InputError(
            "the experts of this family are not computed as a product with down_proj at the end",
            hint="Leave out --refit and --merge.",
        )
    return last.detach(), output


def down_projection(experts: nn.Module, expert: int) -> Tensor:
    """A copy of an expert's down projection, [H, I]. Raises InputError where the class of transformers has none."""
    return _down(*_alone(experts, expert)).clone()


def _alone(experts: nn.Module, expert: int) -> tuple[nn.Module, int]:
    """A module that holds the weights of an expert, and its number there."""
    stored = stored_in(experts)
    return (experts, expert) if stored is None else (stored.module(expert, expert + 1), 0)


def _down(experts: nn.Module, expert: int) -> Tensor:
    """A view [H, I]."""
    if not hasattr(experts, "down_proj"):
        raise InputError(
            f"{type(experts).__name__} of transformers keeps no down_proj of its experts, which this computes with",
            hint="Leave out --refit and --merge.",
        )
    down = experts.down_proj[expert]  # type: ignore[index]
    return down.T if getattr(experts, "is_transposed", False) else down


@contextmanager
def with_down(experts: nn.Module, replaced: Mapping[int, Tensor]) -> Iterator[None]:
    """Inside the block the experts' down projections are the given [H, I] ones."""
    stored = stored_in(experts)
    if stored is not None:
        before = stored.down
        stored.down = before | dict(replaced)
        try:
            yield
        finally:
            stored.down = before
        return
    kept = {e: _down(experts, e).clone() for e in replaced}
    with torch.no_grad():
        for e, values in replaced.items():
            _down(experts, e).copy_(values)
    try:
        yield
    finally:
        with torch.no_grad():
            for e, values in kept.items():
                _down(experts, e).copy_(values)
