"""Ridge regression of the kept experts' down projections, so that a pruned layer reproduces the output of the whole
layer.

Only down_proj changes, so that every stock runtime loads the result. Minimises sum |missing - sum_e g_e a_e dW_e|^2 +
lambda * sum_e m_e |dW_e|^2 by block coordinate descent over the experts; m_e is the mean diagonal of the Gram matrix of
expert e.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeconv.stream.experts import weighted_activations

_ROWS = 8192  # tokens whose activations are in memory at a time
_TOKENS_PER_COLUMN = 3  # that an expert needs: with fewer, the fit follows the text and does not generalise


@dataclass(frozen=True)
class Refit:
    """The settings of a refit. `strength`: the ridge, in units of the mean squared activation. `sweeps`: passes over
    the experts. `target`: "stream" (the residual stream of the unpruned model) or "layer" (the output of the whole
    layer on the inputs of the pruned model)."""

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
    experts: nn.Module, routes: Routes, missing: Tensor, before: Mapping[int, Tensor], refit: Refit
) -> dict[int, Tensor]:
    """New down projections {expert: [H, I]} in the dtype of the old ones, `before` {expert: [H, I]}. `missing` [T, H]
    is the wanted output of the layer minus its output with the old ones."""
    missing = missing.double()
    change = {e: torch.zeros(w.shape, dtype=torch.float64, device=w.device) for e, w in before.items()}
    for _ in range(refit.sweeps):
        for e in before:
            rows, slot = (routes.index == e).nonzero(as_tuple=True)
            weights = routes.weights[rows, slot]
            used = weights != 0
            rows, weights = rows[used], weights[used]
            if not len(rows):
                continue
            inner = _inner(experts, routes.hidden[rows], e, weights)  # [n, I]
            gram = inner.T @ inner
            ridge = refit.strength * float(gram.diagonal().mean())
            if not ridge > 0:
                continue
            wanted = inner.T @ missing[rows] - ridge * change[e].T
            gram.diagonal().add_(ridge)
            step = torch.cholesky_solve(wanted, torch.linalg.cholesky(gram))  # [I, H]
            change[e] += step.T
            missing[rows] -= inner @ step
    return {e: (w.double() + change.pop(e)).to(w.dtype) for e, w in before.items()}


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


def tokens_needed(before: Mapping[int, Tensor]) -> int:
    """The number of tokens per expert that a refit of down projections {expert: [H, I]} needs."""
    return _TOKENS_PER_COLUMN * next(iter(before.values())).shape[1]


def held_out_errors(
    experts: nn.Module, routes: Routes, missing: Tensor, before: Mapping[int, Tensor], after: Mapping[int, Tensor]
) -> tuple[Tensor, Tensor]:
    """(float64 [T] with the old down projections `before`, float64 [T] with the new ones `after`): for each token, the
    squared norm of the wanted output of the layer minus its output. `missing` [T, H] is that difference with the old
    ones."""
    left = missing.double().clone()
    for e, weight in after.items():
        rows, slot = (routes.index == e).nonzero(as_tuple=True)
        if len(rows):
            inner = _inner(experts, routes.hidden[rows], e, routes.weights[rows, slot])
            left[rows] -= inner @ (weight.double() - before[e].double()).T
    return missing.double().square().sum(1), left.square().sum(1)


def _inner(experts: nn.Module, hidden: Tensor, expert: int, weights: Tensor) -> Tensor:
    """The inputs of an expert's down_proj, with the routing weights [n], float64 [n, I]."""
    parts = zip(hidden.split(_ROWS), weights.split(_ROWS))
    return torch.cat([weighted_activations(experts, part, expert, by) for part, by in parts])
