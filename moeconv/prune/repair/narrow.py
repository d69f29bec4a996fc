"""Cuts the experts of a layer to fewer neurons: which ones stay, and their down projections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeconv.data.heldout import clearly_less
from moeconv.prune.need import narrowed_bytes
from moeconv.prune.repair.refit import (
    CHUNK_BYTES,
    Refit,
    RefitOutcome,
    Routes,
    after_change,
    experts_at_once,
    held_out_errors,
    refit_layer,
    routed_rows,
    tokens_needed,
)
from moeconv.prune.repair.routed_pairs import Pairs, add_ridge, outer
from moeconv.prune.repair.surgeon import fitted_columns, kept_neurons, removals
from moeconv.prune.repair.wanted import Wanted
from moeconv.stream.experts import weighted_inputs

_RIDGE = 0.01  # of the choice and of the fit that keeps each expert's own output, in mean squared activations


@dataclass(frozen=True)
class NarrowOutcome:
    """How the narrower experts of a layer do on its held-out tokens: the relative error of the layer's output, and how
    many experts had so few tokens that other tokens of the layer were added to theirs (`pooled`)."""

    layer: int
    error: float
    tokens_per_expert: float
    tokens_needed: int
    pooled: int


@dataclass(frozen=True, eq=False)
class Narrowed:
    """The experts of a layer with fewer neurons: their numbers `neurons` int64 [n, W], and down projections `down` [n,
    H, I], in which the columns of all other neurons are 0."""

    neurons: Tensor
    down: Tensor
    outcome: NarrowOutcome
    fitted: RefitOutcome | None = None


def narrow_layer(
    layer: int, experts: nn.Module, wanted: Wanted, which: Sequence[int], before: Tensor, width: int,
    refit: Refit | None,
) -> Narrowed:  # fmt: skip
    """Keep `width` neurons of each expert in `which`, whose down projections are `before` [n, H, I].

    The down projections are fitted so that each expert keeps its output. With `refit`, they are then fitted to the
    wanted output of the layer; these are used if they are clearly better on held-out tokens.
    """
    needed, available = tokens_needed(before), wanted.tokens_per_expert(len(which))
    enough = available >= needed
    base = before
    if refit is not None and enough:
        base = refit_layer(experts, wanted.routes, wanted.missing, which, before, refit)
    neurons, kept_own, own, pooled = _chosen(experts, wanted.routes, which, base, before, width, needed)

    def held_out(down: Tensor) -> Tensor:
        change = down.float() - before.float()
        return held_out_errors(experts, wanted.held_routes, wanted.held_missing, which, change)[1]

    down, fitted = own, None
    squares = held_out(own)
    if refit is not None:
        better, now = False, squares
        if enough:
            left = after_change(experts, wanted.routes, wanted.missing, which, kept_own.float() - before.float())
            some = columns_of(kept_own, neurons)
            made = refit_layer(experts, wanted.routes, left, which, some, refit, columns=neurons)
            tried = _widened(made, neurons, before)
            now = held_out(tried)
            better = clearly_less(now.cpu(), squares.cpu())
            down = tried if better else own
        was, after = wanted.relative(squares), wanted.relative(now)
        fitted = RefitOutcome(layer, was, after, available, needed, kept=better)
        squares = now if better else squares
    outcome = NarrowOutcome(layer, wanted.relative(squares), available, needed, pooled)
    return Narrowed(neurons, down, outcome, fitted)


def _chosen(
    experts: nn.Module, routes: Routes, which: Sequence[int], base: Tensor, before: Tensor, width: int, needed: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """(the neurons that stay [n, W], the down projections [n, H, I] that keep the outputs of `base`, those that keep
    the outputs of `before`, the number of pooled experts)."""
    _, hidden, inner = before.shape
    size = experts_at_once(before, narrowed_bytes(hidden, inner))
    neurons, fits, owns, pooled = [], [], [], 0
    for first in range(0, len(which), size):
        block = slice(first, min(first + size, len(which)))
        numbers = torch.tensor(list(which[block]), device=before.device)
        gram, few = moments(experts, routes, numbers, inner, needed)
        pooled += few
        add_ridge(gram, _RIDGE)
        kept = kept_neurons(removals(gram, base[block], inner - width)[0], inner)
        neurons.append(kept)
        fits.append(_widened(fitted_columns(gram, base[block], kept), kept, before))
        same = base is before
        owns.append(fits[-1] if same else _widened(fitted_columns(gram, before[block], kept), kept, before))
    return torch.cat(neurons), torch.cat(fits), torch.cat(owns), pooled


def moments(experts: nn.Module, routes: Routes, which: Tensor, inner: int, needed: int) -> tuple[Tensor, int]:
    """(sum of (g h)(g h)^T over the routed tokens of each expert, float64 [n, I, I]; the number of experts that have
    fewer than `needed` tokens). Such an expert also gets other, evenly spaced tokens of the layer, with the mean
    squared weight of its own tokens, or of the layer's tokens where it has none."""
    gram = torch.zeros(len(which), inner, inner, dtype=torch.float64, device=which.device)
    count = torch.zeros(len(which), dtype=torch.float64, device=which.device)
    squares = torch.zeros_like(count)
    for rows, pairs in routed_rows(experts, routes, which, inner):
        rows = rows.double()
        outer(rows, rows, pairs, gram)
        count += pairs.counts
        squares.index_add_(0, pairs.place, pairs.weight.double().square())
    few = (count < needed).nonzero().flatten()
    pool = torch.arange(0, len(routes.hidden), max(1, len(routes.hidden) // needed), device=which.device)[:needed]
    if not len(few) or not len(pool):
        return gram, len(few)
    typical = float(routes.weights[routes.weights != 0].double().square().mean()) if len(routes.weights) else 1.0
    square = torch.where(count > 0, squares / count.clamp_min(1), typical)
    by = (square * (needed - count).clamp_min(0) / len(pool)).sqrt().to(routes.weights.dtype)
    at_once = max(1, CHUNK_BYTES // max(1, 4 * len(pool) * (inner + routes.hidden.shape[1])))
    for some in few.split(at_once):
        place = some.repeat_interleave(len(pool))
        counts = torch.zeros(len(which), dtype=torch.int64, device=which.device)
        counts[some] = len(pool)
        pairs = Pairs(pool.repeat(len(some)), place, by[place], counts)
        rows = weighted_inputs(experts, routes.hidden, pairs.token, which[place], pairs.weight).double()
        outer(rows, rows, pairs, gram)
    return gram, len(few)


def columns_of(down: Tensor, neurons: Tensor) -> Tensor:
    """The columns [n, H, W] of down projections [n, H, I]."""
    return down.gather(2, neurons[:, None].expand(-1, down.shape[1], -1))


def _widened(some: Tensor, neurons: Tensor, like: Tensor) -> Tensor:
    """Down projections [n, H, I] in the dtype of `like` with these columns, [n, H, W], and zeros elsewhere."""
    made = like.new_zeros(len(some), *like.shape[1:])
    return made.scatter_(2, neurons[:, None].expand(-1, like.shape[1], -1), some.to(like.dtype))
