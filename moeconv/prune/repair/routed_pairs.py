"""The routed (token, expert) pairs of a layer, in the order in which all experts are computed at once, and products of
each expert's own rows.

A product runs over rounds: in each, the experts that have rows left take at most `_ROWS` of them, padded to one size.
The number of operations depends on the largest number of rows, not on the number of experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 256  # of one expert in one product


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of a few experts and tokens, sorted by expert: `token` int64 [n], `place` int64 [n] (the number of the
    expert among the few), `weight` [n]. `counts` are the rows of each expert."""

    token: Tensor
    place: Tensor
    weight: Tensor
    counts: Tensor

    def __len__(self) -> int:
        return len(self.token)

    def rounds(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (experts [e], rows int64 [e, w], real bool [e, w]): the next rows of each expert that has any left,
        where `real` is false for the padding, which is row 0."""
        sizes = self.counts.cpu()
        starts, most = sizes.cumsum(0) - sizes, int(sizes.max())
        for first in range(0, most, _ROWS):
            some = (sizes > first).nonzero().flatten()
            at = first + torch.arange(min(_ROWS, most - first))
            real = at < sizes[some, None]
            rows = torch.where(real, starts[some, None] + at, 0)
            yield tuple(x.to(self.token.device) for x in (some, rows, real))  # type: ignore[misc]


def chunked(index: Tensor, weights: Tensor, which: Tensor, *, tokens: int) -> Iterator[Pairs]:
    """Yield the pairs of the experts `which` int64 [g], `tokens` tokens at a time, from the choice of the router,
    `index` int64 and `weights` [T, k]. Pairs of weight 0 are left out."""
    place = torch.full((int(index.max()) + 1 if len(index) else 1,), -1, device=index.device)
    place = torch.cat([place, place.new_full((int(which.max()) + 1,), -1)])
    place[which] = torch.arange(len(which), device=index.device)
    found = torch.where(weights != 0, place[index], -1)
    for first in range(0, len(index), tokens):
        part, scores = found[first : first + tokens].flatten(), weights[first : first + tokens].flatten()
        counts = torch.bincount(part + 1, minlength=len(which) + 1)
        order = part.argsort(stable=True)[int(counts[0]) :]
        yield Pairs(first + order // index.shape[1], part[order], scores[order], counts[1:])


def outer(left: Tensor, right: Tensor, pairs: Pairs, into: Tensor) -> None:
    """into [g, A, B] += the sum over each expert's rows of left [n, A]^T right [n, B]."""
    for some, rows, real in pairs.rounds():
        ours = left[rows] * real[..., None].to(left.dtype)
        if len(some) == len(into) and ours.dtype == into.dtype:
            into.baddbmm_(ours.mT, right[rows])
        else:
            into.index_add_(0, some, torch.bmm(ours.mT, right[rows]).to(into.dtype))


def applied(rows: Tensor, matrices: Tensor, pairs: Pairs) -> Tensor:
    """Each row [A] of `rows` [n, A] times the matrix [A, B] of its expert, out of `matrices` [g, A, B]: [n, B]."""
    made = rows.new_empty(len(rows) + 1, matrices.shape[2])  # the padding goes to the last row
    for some, at, real in pairs.rounds():
        made[torch.where(real, at, len(rows))] = torch.bmm(rows[at], matrices[some])
    return made[:-1]


def add_ridge(gram: Tensor, strength: float) -> Tensor:
    """Add `strength` times its mean diagonal to each diagonal of `gram` float64 [n, I, I], or 1 where an expert has no
    tokens. Returns the ridges [n], 0 where an expert has no tokens."""
    ridge = strength * gram.diagonal(dim1=1, dim2=2).mean(1)
    gram.diagonal(dim1=1, dim2=2).add_(torch.where(ridge > 0, ridge, 1.0)[:, None])
    return ridge
