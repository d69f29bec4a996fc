"""How sure a keep set is: the criterion asked again on resampled tokens, and how much of its choice comes back.

The token sample of the statistics is drawn from with replacement; sums per expert are formed anew from the routing rule
and the outputs' norms, so that any criterion can be asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from moeconv.families.rule import Rule, route
from moeconv.prune.criteria import CRITERIA, Evidence, LayerStatistics, Needs, Order
from moeconv.randomness import generator

_ROWS = ("sample_logits", "sample_outputs", "sample_scale")
# sums over tokens that the sampled tokens give anew
_SUMS = ("count", "gate_sum", "gate_sq_sum", "norm_sum", "norm_sq_sum", "gate_norm_sum", "gate_norm_sq_sum")


def can_resample(needs: Needs) -> bool:
    """Whether all statistics of tokens that a criterion reads can be formed anew from the token sample.

    One sum of all tokens beside one of the sampled tokens would give wrong means, so a criterion that also reads
    another field is not resampled. Similarities of experts stay what they were.
    """
    return set(needs.fields) <= set(_SUMS) and (needs.sample or bool(needs.fields))


class Resampled:
    """Statistics of tokens drawn from the token sample; fields that are no sums over tokens stay what they were.

    The sample does not say from which data source a token is, so the sums are [1, E]: those of all sources together.
    """

    def __init__(self, statistics: LayerStatistics, rule: Rule, draw: np.random.Generator) -> None:
        self._whole, self._rule, self._draw = statistics, rule, draw
        self._rows: dict[int, np.ndarray] = {}
        self._sums: dict[int, dict[str, np.ndarray]] = {}

    def layer(self, layer: int, field: str) -> np.ndarray:
        if field in _ROWS:
            return self._whole.layer(layer, field)[self._drawn(layer)]
        return self._totals(layer).get(field, self._whole.layer(layer, field))

    def _drawn(self, layer: int) -> np.ndarray:
        if layer not in self._rows:
            count = len(self._whole.layer(layer, "sample_logits"))
            self._rows[layer] = self._draw.integers(0, count, count)
        return self._rows[layer]

    def _totals(self, layer: int) -> dict[str, np.ndarray]:
        """The sums [1, E] that the sample can give."""
        if layer not in self._sums:
            logits = self.layer(layer, "sample_logits")
            outputs = self.layer(layer, "sample_outputs").astype(np.float32) * self._whole.layer(layer, "sample_unit")
            experts = logits.shape[1]
            chosen, g = route(
                self._rule, logits, np.ones(experts, bool), bias=self._whole.layer(layer, "sample_bias"),
                factor=float(self._whole.layer(layer, "sample_factor")[0]),
            )  # fmt: skip
            norm = np.take_along_axis(np.linalg.norm(outputs, axis=2), chosen, 1).astype(np.float64)
            values = dict(zip(_SUMS, (np.ones_like(g), g, g**2, norm, norm**2, g * norm, (g * norm) ** 2), strict=True))
            self._sums[layer] = {
                name: np.bincount(chosen.reshape(-1), v.reshape(-1), minlength=experts)[None]
                for name, v in values.items()
            }
        return self._sums[layer]


def stability(
    evidence: Evidence, criterion: str, orders: Mapping[int, Order], removed: Sequence[int],
    *, protected: Mapping[int, frozenset[int]], draws: int = 8,
) -> dict[int, float]:  # fmt: skip
    """{removed: the mean share of the kept experts that a resample keeps too} over layers and `draws` resamples."""
    assert evidence.statistics is not None and evidence.rule is not None
    shares: dict[int, list[float]] = {count: [] for count in removed}
    for i in range(draws):
        draw = generator((evidence.seed, "bootstrap", i))
        again = replace(evidence, statistics=Resampled(evidence.statistics, evidence.rule, draw), samples={})
        for layer, order in orders.items():
            other = CRITERIA[criterion].order(again, layer, protected[layer])
            for count in removed:
                gone = set(order.experts[:count])
                kept = len(order.scores) - len(gone)
                lost = len(set(other.experts[:count]) - gone)  # kept by the one, dropped by the other
                shares[count].append((kept - lost) / kept)
    return {count: float(np.mean(values)) for count, values in shares.items()}
