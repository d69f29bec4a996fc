"""The outputs, activations and down projections of the experts of a stock module, in any layout and storage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moeconv.errors import InputError
from moeconv.stream.need import GROUP_ROWS, PAIR_ROWS
from moeconv.stream.products import OnProducts
from moeconv.stream.stored import is_transposed, stored_in, takes_index, unweighted


def pair_outputs(
    experts: nn.Module, hidden: Tensor, token: Tensor, expert: Tensor, *, dtype: torch.dtype | None = None,
    weights: Tensor | None = None,
) -> Iterator[tuple[slice, Tensor]]:  # fmt: skip
    """Yield (rows, unweighted outputs [m, H]) for (token, expert) pairs, block by block in their order. `token` int64
    [n] are rows of `hidden` [T, H]; `expert` int64 [n] must be in ascending order. `dtype` is the dtype of the routing
    weights that the module expects. With `weights` [n], these multiply the experts' inputs."""
    step = PAIR_ROWS if stored_in(experts) is None else GROUP_ROWS
    for module, first, rows in _modules(experts, expert):
        for start in range(rows.start, rows.stop, step):
            block = slice(start, min(start + step, rows.stop))
            given = hidden[token[block]]
            if weights is not None:
                given = given * weights[block, None]
            yield block, unweighted(module, given, expert[block] - first, dtype=dtype)


def _modules(experts: nn.Module, expert: Tensor) -> Iterator[tuple[nn.Module, int, slice]]:
    """Yield (module, its first expert, the rows of `expert` that belong to it): modules whose weights are in the dtype
    of the computation."""
    stored = stored_in(experts)
    if stored is None:
        yield experts, 0, slice(0, len(expert))
        return
    for first, stop, rows in stored.pairs(expert):
        yield stored.module(first, stop), first, rows


def activations(experts: nn.Module, hidden: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """(the input [n, I] of an expert's down projection, the expert's output [n, H]) for `hidden` [n, H].

    Raises InputError where the last product of the stock code is not the one with the down projection.
    """
    module, at = _alone(experts, expert)
    last: Tensor | None = None

    def keep_input(factors: Sequence[Tensor], product: Tensor) -> Tensor:
        nonlocal last
        last = factors[0].flatten(0, -2)
        return product

    with OnProducts(keep_input):
        output = unweighted(module, hidden, torch.full((len(hidden),), at, device=hidden.device))
    width = _down(module, at).shape[1]
    if last is None or last.shape != (len(hidden), width):
        raise InputError(
            "the experts of this family do not end in a product with down_proj, so that its input cannot be read",
            hint="Leave out --refit and --merge.",
        )
    return last.detach(), output


def weighted_activations(experts: nn.Module, hidden: Tensor, expert: int, weights: Tensor) -> Tensor:
    """The input [n, I] of an expert's down projection for `hidden` [n, H], in float64, so multiplied by the routing
    `weights` [n] that its product with the down projection is what the expert adds to the layer's output."""
    if takes_index(experts):
        return activations(experts, hidden, expert)[0].double() * weights[:, None].double()
    return activations(experts, hidden * weights[:, None].to(hidden.dtype), expert)[0].double()


def down_projection(experts: nn.Module, expert: int) -> Tensor:
    """A copy of an expert's down projection, [H, I]. Raises InputError if the class of transformers has none."""
    return _down(*_alone(experts, expert)).clone()


def _alone(experts: nn.Module, expert: int) -> tuple[nn.Module, int]:
    """(a module that holds the weights of an expert, the number of the expert in it)."""
    stored = stored_in(experts)
    return (experts, expert) if stored is None else (stored.module(expert, expert + 1), 0)


def _down(experts: nn.Module, expert: int) -> Tensor:
    """A view [H, I]."""
    if not hasattr(experts, "down_proj"):
        raise InputError(
            f"the class {type(experts).__name__} of transformers has no down_proj, which a refit or a merge changes",
            hint="Leave out --refit and --merge.",
        )
    down = experts.down_proj[expert]  # type: ignore[index]
    return down.T if is_transposed(experts) else down


@contextmanager
def with_down(experts: nn.Module, replaced: Mapping[int, Tensor]) -> Iterator[None]:
    """Inside the block, the down projections of these experts are replaced by the given ones, {expert: [H, I]}."""
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
