"""How stable a set of kept experts is: the criterion decides again on resampled tokens, and the overlap is measured.

The tokens are drawn with replacement from the token sample of the statistics. The sums per expert are computed again
from the routing rule and the norms of the outputs, so that any criterion can be applied to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from moeconv.families.rule import Rule, route
from moeconv.prune.criteria import CRITERIA, Evidence, LayerStatistics, Needs, Order
from moeconv.randomness import generator

_ROWS = ("sample_logits", "sample_outputs", "sample_scale")
# sums over tokens that can be computed from the token sample
_SUMS = ("count", "gate_sum", "gate_sq_sum", "norm_sum", "norm_sq_sum", "gate_norm_sum", "gate_norm_sq_sum")


def can_resample(needs: Needs) -> bool:
    """Whether all token statistics that a criterion reads can be computed from the token sample.

    A sum over all tokens together with a sum over the sampled tokens would give wrong means, so a criterion that also
    reads another field is not resampled. Similarities between experts are not resampled.
    """
    return set(needs.fields) <= set(_SUMS) and (needs.sample or bool(needs.fields))


class Resampled:
    """Statistics of tokens that were drawn from the token sample. Fields that are not sums over tokens keep their
    values.

    The sample does not record the data source of a token, so the sums are [1, E], over all sources together.
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
        """The sums [1, E] that can be computed from the sample."""
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
    """{number removed: the share of the kept experts that a resample also keeps, averaged over layers and `draws`
    resamples}."""
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
                lost = len(set(other.experts[:count]) - gone)  # kept here, and dropped on the resampled tokens
                shares[count].append((kept - lost) / kept)
    return {count: float(np.mean(values)) for count, values in shares.items()}
