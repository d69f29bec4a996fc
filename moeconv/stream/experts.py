"""The outputs and down projections of the experts of a stock module, and what these read, in any layout and storage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moeconv.errors import InputError
from moeconv.stream.need import GROUP_ROWS, PAIR_ROWS
from moeconv.stream.products import OnProducts, StableSorts
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


def down_inputs(
    experts: nn.Module, hidden: Tensor, token: Tensor, expert: Tensor, *, weights: Tensor | None = None,
    rows_at_once: int = PAIR_ROWS,
) -> Iterator[tuple[slice, Tensor]]:  # fmt: skip
    """Yield (rows, inputs [m, I] of the down projections) for (token, expert) pairs as `pair_outputs` takes them, on
    the device of the experts. The stock module computes them, so that gates, activations and biases are its own.

    Raises InputError where the stock code has no product with the down projections.
    """
    step = rows_at_once if stored_in(experts) is None else GROUP_ROWS
    for module, first, rows in _modules(experts, expert):
        down = _down(module)
        for start in range(rows.start, rows.stop, step):
            block = slice(start, min(start + step, rows.stop))
            given, chosen = (x.to(down.device) for x in (hidden[token[block]], expert[block] - first))
            if weights is not None:
                given = given * weights[block, None].to(given.dtype)
            with multiplied_by(down) as found:
                unweighted(module, given, chosen)
            if sum(map(len, found)) != len(given):
                raise InputError(
                    "the experts of this family do not end in a product with down_proj, so that its input cannot be "
                    "read",
                    hint="Leave out --refit and --merge.",
                )
            yield block, torch.cat(found)


@contextmanager
def multiplied_by(weight: Tensor) -> Iterator[list[Tensor]]:
    """Collects the other factor of every product with `weight`, or a part of it, inside the block. The stock code
    computes one expert after the other, or sorts the pairs by expert for one product of all. Pairs of one expert stay
    in their order."""
    place, found = weight.untyped_storage().data_ptr(), list[Tensor]()

    def collect(factors: Sequence[Tensor], product: Tensor) -> Tensor:
        if len(factors) > 1 and factors[1].untyped_storage().data_ptr() == place:
            found.append(factors[0].detach().flatten(0, -2))
        return product

    with OnProducts(collect), StableSorts():
        yield found


def weighted_inputs(experts: nn.Module, hidden: Tensor, token: Tensor, expert: Tensor, weights: Tensor) -> Tensor:
    """The inputs [n, I] of the down projections in float32, so multiplied by the routing `weights` [n] that the product
    with the down projection is what the expert adds to the layer's output."""
    by = weights.float()
    if takes_index(experts):
        return torch.cat([made.float() for _, made in down_inputs(experts, hidden, token, expert)]) * by[:, None]
    return torch.cat([made.float() for _, made in down_inputs(experts, hidden, token, expert, weights=by)])


def activations(experts: nn.Module, hidden: Tensor, expert: int) -> Tensor:
    """The input [n, I] of the down projection of one expert for `hidden` [n, H]. Raises what `down_inputs` raises."""
    every = torch.arange(len(hidden), device=hidden.device)
    return torch.cat([made for _, made in down_inputs(experts, hidden, every, torch.full_like(every, expert))])


def down_projections(experts: nn.Module, which: Sequence[int]) -> Tensor:
    """A copy of the down projections of these experts, in ascending order: [n, H, I]. Raises InputError if the class of
    transformers has none."""
    stored = stored_in(experts)
    if stored is None:
        return _turned(experts, _down(experts).detach()[list(which)])
    parts = []
    for first, stop in stored.groups():
        if here := [e - first for e in which if first <= e < stop]:
            module = stored.module(first, stop)
            parts.append(_turned(module, _down(module).detach()[here]))
    return torch.cat(parts)


def _down(experts: nn.Module) -> Tensor:
    """The down projections of all experts as the stock module holds them, [E, H, I] or [E, I, H]."""
    if not hasattr(experts, "down_proj"):
        raise InputError(
            f"the class {type(experts).__name__} of transformers has no down_proj, which a refit or a merge changes",
            hint="Leave out --refit and --merge.",
        )
    down: Tensor = experts.down_proj  # type: ignore[assignment]
    return down


def _turned(experts: nn.Module, down: Tensor) -> Tensor:
    """Down projections [n, H, I] as a stock module holds them, and back."""
    return down.mT if is_transposed(experts) else down


@contextmanager
def with_down(experts: nn.Module, which: Sequence[int], values: Tensor) -> Iterator[None]:
    """Inside the block, the down projections of the experts `which`, in ascending order, are `values` [n, H, I]."""
    stored = stored_in(experts)
    if stored is not None:
        before = stored.down
        stored.down = (list(which), _turned(experts, values))
        try:
            yield
        finally:
            stored.down = before
        return
    down, at = _down(experts), list(which)
    kept = down.detach()[at]
    with torch.no_grad():
        down[at] = _turned(experts, values).to(down.dtype)
    try:
        yield
    finally:
        with torch.no_grad():
            down[at] = kept
