"""Ridge refit of the kept experts' down projections, so that a pruned layer gives what the whole one gave.

Only down_proj changes, so the result loads in every stock runtime. Block coordinate descent over the experts on
sum |missing - sum_e g_e a_e dW_e|^2 + lambda * sum_e m_e |dW_e|^2, m_e the mean diagonal of expert e's Gram matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeconv.stream.experts import activations

_ROWS = 8192  # tokens whose activations are held at a time
_TOKENS_PER_COLUMN = 3  # that an expert needs: with fewer, the fit is of the text and not of the model


@dataclass(frozen=True)
class Refit:
    """`strength`: the ridge, in units of the mean squared activation; `sweeps` over the experts; `target` "stream" (the
    unpruned model's residual stream) or "layer" (the whole layer on the pruned model's inputs)."""

    strength: float = 0.3
    sweeps: int = 2
    target: str = "stream"


@dataclass(frozen=True, eq=False)
class Routes:
    """Tokens of one layer: `hidden` [T, H], `index` [T, k], `weights` [T, k]."""

    hidden: Tensor
    index: Tensor
    weights: Tensor

    def where(self, chosen: Tensor) -> Routes:
        """The tokens that `chosen` bool [T] marks."""
        return Routes(self.hidden[chosen], self.index[chosen], self.weights[chosen])


def refit_layer(
    experts: nn.Module, routes: Routes, missing: Tensor, before: Mapping[int, Tensor], refit: Refit
) -> dict[int, Tensor]:
    """New down projections {expert: [H, I]} in the dtype of the old ones. `missing` [T, H] is what the layer's output
    lacks with the old ones, `before` {expert: [H, I]}."""
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
            inner = _inner(experts, routes.hidden[rows], e) * weights[:, None].double()  # [n, I]
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
    """How a layer's refit fared on its held-out tokens: relative errors with the old weights and with the new ones,
    tokens per expert that shaped these and that are needed, and whether the new ones are `kept`."""

    layer: int
    error_before: float
    error_after: float
    tokens_per_expert: float
    tokens_needed: int
    kept: bool


def tokens_needed(before: Mapping[int, Tensor]) -> int:
    """Tokens per expert that a refit of down projections {expert: [H, I]} needs."""
    return _TOKENS_PER_COLUMN * next(iter(before.values())).shape[1]


def judged(
    experts: nn.Module, routes: Routes, missing: Tensor, before: Mapping[int, Tensor], after: Mapping[int, Tensor]
) -> tuple[Tensor, Tensor]:
    """Squared norms of what the layer's output lacks [T, H], by token: float64 [T] with the old down projections and
    with the new ones."""
    left = missing.double().clone()
    for e, weight in after.items():
        rows, slot = (routes.index == e).nonzero(as_tuple=True)
        if len(rows):
            inner = _inner(experts, routes.hidden[rows], e) * routes.weights[rows, slot][:, None].double()
            left[rows] -= inner @ (weight.double() - before[e].double()).T
    return missing.double().square().sum(1), left.square().sum(1)


def _inner(experts: nn.Module, hidden: Tensor, expert: int) -> Tensor:
    """An expert's activations in front of down_proj, float64 [n, I]."""
    return torch.cat([activations(experts, part, expert)[0].double() for part in hidden.split(_ROWS)])
