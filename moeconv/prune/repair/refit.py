"""Ridge regression of the kept experts' down projections, so that a pruned layer reproduces the output of the whole
layer.

Only down_proj changes, so that every stock runtime loads the result. Minimises sum |missing - sum_e g_e a_e dW_e|^2 +
lambda * sum_e m_e |dW_e|^2, where m_e is the mean diagonal of the Gram matrix of expert e, by block coordinate descent.
A block is as many experts as the memory allows, all of which are computed at once: conjugate gradients whose
preconditioner is the exact solution of each expert alone. A block of one expert is solved in one step. Of several
processes, each has its tokens, and all take the same steps by the sums over all tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moeconv.prune.need import REFIT_BYTES, ROWS_BYTES, fitted_bytes
from moeconv.prune.repair.routed_pairs import Pairs, add_ridge, applied, chunked, outer
from moeconv.stream.device import room_on
from moeconv.stream.experts import weighted_inputs
from moeconv.world import current, first, summed

_STEPS = 2  # of conjugate gradients per sweep, in a block of several experts
CHUNK_BYTES = 1 << 27  # of the pairs that are computed at a time
_TOKENS_PER_COLUMN = 3  # that an expert needs: with fewer, the fit follows the text and does not generalise


@dataclass(frozen=True)
class Refit:
    """The settings of a refit. `strength`: the ridge, in units of the mean squared activation. `sweeps`: passes over
    the experts; where they are one block, pairs of steps of conjugate gradients. `target`: "stream" (the residual
    stream of the unpruned model) or "layer" (the output of the whole layer on the inputs of the pruned model)."""

    strength: float = 0.3
    sweeps: int = 2
    target: str = "stream"


@dataclass(frozen=True, eq=False)
class Routes:
    """The routed tokens of one layer: `hidden` [T, H], `index` [T, k], `weights` [T, k]."""

    hidden: Tensor
    index: Tensor
    weights: Tensor

    def where(self, chosen: Tensor) -> Routes:
        """The tokens that `chosen` bool [T] marks."""
        return Routes(self.hidden[chosen], self.index[chosen], self.weights[chosen])


def refit_layer(
    experts: nn.Module, routes: Routes, missing: Tensor, which: Sequence[int], before: Tensor, refit: Refit,
    columns: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """New down projections [n, H, I] of the experts `which`, in the dtype of the old ones, `before` [n, H, I].
    `missing` [T, H] is the wanted output of the layer minus its output with the old ones. With `columns` int64 [n, W],
    these are the only neurons that the experts have: `before` and the result are [n, H, W]."""
    missing = missing.to(torch.float32, copy=True)
    change = torch.zeros(before.shape, device=before.device)
    size = experts_at_once(before, fitted_bytes(*before.shape[1:]))
    blocks = [slice(start, min(start + size, len(which))) for start in range(0, len(which), size)]
    sweeps, steps = (1, refit.sweeps) if len(blocks) == 1 else (refit.sweeps, 1)
    for _ in range(sweeps):
        for block in blocks:
            numbers = torch.tensor(list(which[block]), device=before.device)
            some = None if columns is None else columns[block]
            work = _Block(experts, routes, numbers, refit.strength, before.shape[2], some)
            work.solve(missing, change[block], steps=steps * (1 if len(numbers) == 1 else _STEPS))
    return (before.float() + change).to(before.dtype)


def experts_at_once(before: Tensor, nbytes: int) -> int:
    """The number of experts that are computed at the same time on the device of `before`, if each takes `nbytes`."""
    cpu = before.device.type == "cpu"
    limit = REFIT_BYTES if cpu else first(lambda: room_on(before.device) // 4)
    return max(1, limit // nbytes)


def routed_rows(
    experts: nn.Module, routes: Routes, which: Tensor, inner: int, *, skip: int = 0
) -> Iterator[tuple[Tensor, Pairs]]:
    """Yield (the weighted inputs of the down projections float32 [n, I], their pairs) of the experts `which` int64 [g],
    some tokens at a time: as many as the memory allows for rows of `inner` columns. The first `skip` are left out."""
    each = 4 * routes.index.shape[1] * (inner + routes.hidden.shape[1])
    for pairs in chunked(routes.index, routes.weights, which, tokens=max(1, CHUNK_BYTES // each)):
        if not len(pairs):
            continue
        if skip:
            skip -= 1
        else:
            yield weighted_inputs(experts, routes.hidden, pairs.token, which[pairs.place], pairs.weight), pairs


@dataclass(frozen=True, eq=False)
class _Block:
    """The normal equations of the experts `which` int64 [g], whose hidden activations have `inner` columns."""

    experts: nn.Module
    routes: Routes
    which: Tensor
    strength: float
    inner: int
    columns: Tensor | None = None
    kept: list[tuple[Tensor, Pairs]] = field(default_factory=list, repr=False)

    def solve(self, missing: Tensor, change: Tensor, *, steps: int) -> None:
        """Take `steps` steps of conjugate gradients. Updates `change` [g, H, I], and what is `missing` [T, H]."""
        shape = (len(self.which), self.inner)
        gram = torch.zeros(*shape, self.inner, dtype=torch.float64, device=change.device)
        left = torch.zeros(*shape, missing.shape[1], device=change.device)  # minus half the gradient, [g, I, H]
        for rows, pairs in self._rows():
            outer(rows.double(), rows.double(), pairs, gram)  # float32 would lose what a weak ridge leaves
            outer(rows, missing[pairs.token], pairs, left)
        summed(gram)
        summed(left)
        ridge = add_ridge(gram, self.strength)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram)).float()  # half the products of a solve
        del gram
        ridges = ridge.float()[:, None, None]
        left -= ridges * change.mT
        left *= (ridge > 0)[:, None, None]  # an expert without tokens does not change
        search, before = torch.zeros_like(left), torch.ones((), dtype=torch.float64, device=left.device)
        for step in range(steps):
            solved = torch.bmm(inverse, left)
            slope = _dot(left, solved)
            turn = torch.where(before > 0, slope / before, 0.0).float()  # 0 / 0 where nothing is missing
            search = solved if step == 0 else solved.add_(search * turn)
            reach = torch.zeros_like(missing)
            curved = ridges * search if current().leads else torch.zeros_like(search)
            for rows, pairs in self._rows():
                here = applied(rows, search, pairs)
                reach.index_add_(0, pairs.token, here)
                outer(rows, reach[pairs.token], pairs, curved)
            along = _dot(search, summed(curved))
            rate = torch.where(along > 0, slope / along, 0.0).float()
            change += (rate * search).mT
            missing -= rate * reach
            left -= rate * curved
            before = slope

    def _rows(self) -> Iterator[tuple[Tensor, Pairs]]:
        """`routed_rows`, of the columns that the experts have. The first ones, up to ROWS_BYTES, are computed once."""
        yield from self.kept
        held, fits = sum(rows.nbytes for rows, _ in self.kept), not self.kept
        for rows, pairs in routed_rows(self.experts, self.routes, self.which, self.inner, skip=len(self.kept)):
            own = rows if self.columns is None else rows.gather(1, self.columns[pairs.place])
            held += own.nbytes
            fits = fits and held <= ROWS_BYTES
            if fits:
                self.kept.append((own, pairs))
            yield own, pairs


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum((1, 2)).double().sum()


@dataclass(frozen=True)
class RefitOutcome:
    """The result of a layer's refit on its held-out tokens: the relative errors with the old and with the new weights,
    the tokens per expert that the fit used and that it needs, and whether the new weights are used (`kept`)."""

    layer: int
    error_before: float
    error_after: float
    tokens_per_expert: float
    tokens_needed: int
    kept: bool


def tokens_needed(before: Tensor) -> int:
    """The number of tokens per expert that a refit of down projections [n, H, I] needs."""
    return _TOKENS_PER_COLUMN * before.shape[2]


def held_out_errors(
    experts: nn.Module, routes: Routes, missing: Tensor, which: Sequence[int], change: Tensor
) -> tuple[Tensor, Tensor]:
    """(float64 [T] with the old down projections, float64 [T] with `change` [n, H, I] added to them): for each token,
    the squared norm of the wanted output of the layer minus its output. `missing` [T, H] is that difference with the
    old ones."""
    left = after_change(experts, routes, missing, which, change)
    return missing.double().square().sum(1), left.double().square().sum(1)


def after_change(experts: nn.Module, routes: Routes, missing: Tensor, which: Sequence[int], change: Tensor) -> Tensor:
    """What is `missing` [T, H] in float32 after `change` [n, H, I] was added to the down projections of the experts
    `which`."""
    left, numbers = missing.float().clone(), torch.tensor(list(which), device=missing.device)
    for rows, pairs in routed_rows(experts, routes, numbers, change.shape[2]):
        left.index_add_(0, pairs.token, applied(rows, change.float().mT, pairs), alpha=-1)
    return left
