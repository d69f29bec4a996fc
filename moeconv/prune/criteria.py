"""Pruning criteria: a function each, from what was measured to an order of removal with a cost per removal.

A criterion declares what it needs. Low scores go first; ties go to the higher index, so the order is total.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moeconv.errors import InputError


class Statistics(Protocol):
    """What a statistics file gives: a field of one MoE layer as an array."""

    def layer(self, layer: int, field: str) -> np.ndarray: ...


@dataclass(frozen=True)
class Evidence:
    """What the criteria of a run may look at: statistics, or {layer: [E]} scores measured on the weights."""

    statistics: Statistics | None = None
    aimer: Mapping[int, np.ndarray] | None = None


@dataclass(frozen=True)
class Order:
    """One layer: experts in the order in which they go, what each removal costs, and every expert's score [E]."""

    experts: tuple[int, ...]
    costs: tuple[float, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Criterion:
    """A criterion's function and what it needs: "statistics" or "weights"."""

    name: str
    needs: str
    order: Callable[[Evidence, int, frozenset[int]], Order]


CRITERIA: dict[str, Criterion] = {}


def criterion(name: str, *, needs: str):
    """Register `(evidence, layer, protected experts) -> Order` under a name."""

    def register(function: Callable[[Evidence, int, frozenset[int]], Order]):
        CRITERIA[name] = Criterion(name, needs, function)
        return function

    return register


def by_score(scores: np.ndarray, protected: frozenset[int]) -> Order:
    """The order that a score per expert means: lowest first, among equals the highest index first."""
    ranked = sorted((float(s), -e) for e, s in enumerate(scores) if e not in protected)
    experts = tuple(-e for _, e in ranked)
    return Order(experts, tuple(s for s, _ in ranked), tuple(float(s) for s in scores))


def _total(evidence: Evidence, layer: int, field: str) -> np.ndarray:
    """A field [S, E] summed over the data sources: [E]."""
    assert evidence.statistics is not None  # the planner looks at `needs` first
    return np.asarray(evidence.statistics.layer(layer, field), np.float64).sum(axis=0)


def _checked(scores: np.ndarray, layer: int) -> np.ndarray:
    if not np.isfinite(scores).all():
        raise InputError(f"the statistics of layer {layer} hold NaN or infinite values", hint="Calibrate again.")
    if not scores.any():
        raise InputError(
            f"the statistics of layer {layer} are all zero: no token reached an expert",
            hint="Calibrate on more or other text.",
        )
    return scores


@criterion("utilization", needs="statistics")
def utilization(evidence: Evidence, layer: int, protected: frozenset[int]) -> Order:
    """Tokens that were routed to the expert."""
    return by_score(_checked(_total(evidence, layer, "count"), layer), protected)


@criterion("reap", needs="statistics")
def reap(evidence: Evidence, layer: int, protected: frozenset[int]) -> Order:
    """Mean of gate weight times output norm over the expert's tokens (REAP, arXiv 2510.13999)."""
    count, total = _total(evidence, layer, "count"), _total(evidence, layer, "gate_norm_sum")
    _checked(count, layer)
    return by_score(np.divide(total, count, out=np.zeros_like(total), where=count > 0), protected)


@criterion("saliency", needs="statistics")
def saliency(evidence: Evidence, layer: int, protected: frozenset[int]) -> Order:
    """Sum of gate weight times output norm over the expert's tokens: what it adds to the residual stream in all."""
    return by_score(_checked(_total(evidence, layer, "gate_norm_sum"), layer), protected)


@criterion("redundancy", needs="statistics")
def redundancy(evidence: Evidence, layer: int, protected: frozenset[int]) -> Order:
    """Utilization and cosine similarity together: saliency times (1 - best output cosine to an expert that stays).

    Greedy: after each removal the stand-ins of the others are looked up again among those that are left.
    """
    assert evidence.statistics is not None  # the planner looks at `needs` first
    weight = _checked(_total(evidence, layer, "gate_norm_sum"), layer)
    cosine = np.array(evidence.statistics.layer(layer, "output_cosine"), np.float64)
    np.fill_diagonal(cosine, -1.0)
    left = list(range(len(weight)))
    experts: list[int] = []
    costs: list[float] = []
    first: np.ndarray | None = None
    while len(left) > 1:
        best = cosine[np.ix_(left, left)].max(axis=1)
        cost = weight[left] * (1.0 - np.clip(best, 0.0, 1.0))
        if first is None:
            first = cost
        candidates = [(float(c), -e) for c, e in zip(cost, left) if e not in protected]
        if not candidates:
            break
        price, expert = min(candidates)
        experts.append(-expert)
        costs.append(price)
        left.remove(-expert)
    scores = weight if first is None else first
    return Order(tuple(experts), tuple(costs), tuple(float(s) for s in scores))


@criterion("aimer", needs="weights")
def aimer(evidence: Evidence, layer: int, protected: frozenset[int]) -> Order:
    """Weights only: mean|W| / sqrt(mean W^2), the highest goes first, so its negative is the score."""
    assert evidence.aimer is not None  # the planner looks at `needs` first
    return by_score(-evidence.aimer[layer], protected)
