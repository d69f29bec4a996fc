"""Second moments of the inputs of experts, for all experts of a group in one product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PRIOR = 256  # the weight of the pool, as a number of routed tokens: it matters most for an expert with few tokens
_ROWS = 256  # tokens per expert in one product
_SUMMED = 4096  # tokens that are converted to float64 at a time


@dataclass(frozen=True, eq=False)
class ExpertTokens:
    """The tokens that are used for the codes of one expert: its own at `rows` int64 [n] with `weights` float32 [n], and
    those of the pool, each with the weight `rest`. All weights sum to 1."""

    rows: Tensor
    weights: Tensor
    rest: float


def expert_tokens(
    index: Tensor, weights: Tensor, free: Tensor, *, experts: Sequence[int], pooled: int
) -> dict[int, ExpertTokens]:
    """The tokens that are used for the codes of each expert, out of those that are `free`, bool [T] (not held out).
    `index` int64 and `weights` [T, k] are the router's choice, `pooled` is the size of the pool."""
    slots = free[:, None].expand_as(index).flatten().nonzero().flatten()
    chosen = index.flatten()[slots]
    order = chosen.argsort(stable=True)
    counts = torch.bincount(chosen, minlength=max(experts) + 1).tolist()
    rows = (slots // index.shape[1])[order].split(counts)
    scores, of = weights.flatten()[slots][order].clamp(min=0), chosen[order]
    count = torch.tensor(counts, dtype=torch.float64)
    own = torch.zeros_like(count).index_add_(0, of, scores.double())
    share = torch.where(own > 0, count / (count + PRIOR), 0.0)
    shares = (scores * (share / own.masked_fill(own <= 0, 1.0))[of]).to(scores.dtype).split(counts)
    rest = ((1 - share) / max(1, pooled)).tolist()
    return {e: ExpertTokens(rows[e], shares[e], rest[e]) for e in experts}


def moments(take: Callable[[Tensor], tuple[Tensor, Tensor]], weights: Tensor, counts: Sequence[int]) -> Tensor:
    """The weighted sums of a b^T over the tokens of each expert, float64 [E, A, B]. `take(at)` returns a [n, A] and b
    [n, B] at the positions `at` int64 [n]. Expert e has the `counts[e]` positions that follow those of the experts
    before it; `weights` is float32 [sum of counts]."""
    sizes = torch.tensor(counts)
    starts = sizes.cumsum(0) - sizes
    if not any(counts):  # no token was routed to any of these experts
        left, right = take(torch.empty(0, dtype=torch.int64))
        return torch.zeros(len(counts), left.shape[1], right.shape[1], dtype=torch.float64, device=left.device)
    total: Tensor | None = None
    for first in range(0, max(counts), _ROWS):
        some = (sizes > first).nonzero().flatten() if first else torch.arange(len(sizes))
        width = min(_ROWS, max(counts) - first)
        at = first + torch.arange(width)
        there = at < sizes[some, None]  # [e, width]
        places = torch.where(there, starts[some, None] + at, 0).to(weights.device)
        left, right = (x.view(len(some), width, -1) for x in take(places.flatten()))
        scaled = left * (weights[places] * there.to(weights.device))[..., None]
        product = torch.bmm(scaled.mT, right).double()
        if total is None:
            total = product
        else:
            total.index_add_(0, some.to(total.device), product)
    assert total is not None
    return total


def sums(values: Tensor, weights: Tensor, counts: Sequence[int]) -> Tensor:
    """The weighted sums of `values` [n, A] over the tokens of each expert, float64 [E, A]. Expert e has `counts[e]`
    rows; `weights` is float32 [n]."""
    expert = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(values.device)
    total = torch.zeros(len(counts), values.shape[1], dtype=torch.float64, device=values.device)
    for part in torch.arange(len(values), device=values.device).split(_SUMMED):
        total.index_add_(0, expert[part], (values[part] * weights[part, None]).double())
    return total
