"""Pruning criteria: one function per criterion, which turns measurements into an order of removal with a cost per
removal.

The decorator of a criterion declares what must be measured for it. Experts with low scores are removed first. Of equal
scores, the higher index is removed first, so that the order is total. --criterion lists the criteria in the order of
this file. Other packages add theirs through the entry point moeconv.criteria.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from moeconv.errors import InputError
from moeconv.families.rule import Rule
from moeconv.plugins import Registry
from moeconv.prune.reconstruction import Reconstruction
from moeconv.randomness import generator

SIMILARITIES = ("output", "aligned", "raw", "router")
OF_WEIGHTS = ("aligned", "raw")  # the similarities that are read from the weights


class LayerStatistics(Protocol):
    """One field of one MoE layer of a statistics file, as an array."""

    def layer(self, layer: int, field: str) -> np.ndarray: ...


@dataclass(frozen=True)
class Evidence:
    """What a criterion may read: the statistics, with the model's routing `rule` for their token sample; what was
    measured on the weights; and the `seed` of random criteria.

    `weights` {layer: float64 [E]} is what the criterion's own measure of the weights returned (`weights`, below).
    `weight_cosine` {layer: [E, E]} holds the similarities "aligned" or "raw".
    """

    statistics: LayerStatistics | None = None
    weights: Mapping[int, np.ndarray] | None = None
    weight_cosine: Mapping[int, np.ndarray] | None = None
    rule: Rule | None = None
    similarity: str = "output"
    seed: int = 0
    num_experts: int = 0
    samples: dict[int, Reconstruction] = field(default_factory=dict, repr=False)  # of the layers read so far


@dataclass(frozen=True)
class Order:
    """One layer: the experts in the order in which they are removed, the cost of each removal, and the score of every
    expert [E]."""

    experts: tuple[int, ...]
    costs: tuple[float, ...]
    scores: tuple[float, ...]


# -- what a criterion needs -------------------------------------------------------------------------------------------


class ExpertWeights(Protocol):
    """The matrices of one expert, which are decoded and read block by block."""

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(index of the matrix, its next values as flat float32), in the order of storage."""
        ...

    def sums(self) -> np.ndarray:
        """float64 [matrices, 3]: for each matrix the sum of |W|, the sum of W^2, and the number of values."""
        ...


WeightMeasure = Callable[[ExpertWeights], float]


@dataclass(frozen=True)
class Needs:
    """What must be measured before a criterion can decide. `fields` are the fields of the statistics that it reads.
    `sample`: it reads their token sample. `similarity`: it calls `similarity`. `weights` is applied to the weights of
    every expert, and its results are in `Evidence.weights`."""

    fields: tuple[str, ...] = ()
    sample: bool = False
    similarity: bool = False
    weights: WeightMeasure | None = None

    @property
    def data(self) -> bool:
        """Whether a model must be run on data."""
        return bool(self.fields) or self.sample

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            self.fields + other.fields, self.sample or other.sample, self.similarity or other.similarity,
            self.weights or other.weights,
        )  # fmt: skip


def stats(field: str, *more: str, similarity: bool = False) -> Needs:
    """Fields of the statistics, which calibrate/statistics.py computes. Most are sums over tokens, [sources, E]."""
    return Needs(fields=(field, *more), similarity=similarity)


def sample() -> Needs:
    """The token sample of the statistics, which `sample_of` returns."""
    return Needs(sample=True)


def weights(measure: WeightMeasure) -> Needs:
    """A number per expert that `measure` computes from the expert's weights alone. It is called once per expert."""
    return Needs(weights=measure)


NOTHING = Needs()


# -- the registry -----------------------------------------------------------------------------------------------------

OrderFunction = Callable[[Evidence, int, frozenset[int]], Order]
Refine = Callable[[Evidence, int, frozenset[int], Sequence[int]], list[int]]


@dataclass(frozen=True)
class Criterion:
    """The function of a criterion, and what it needs. `refine` improves a set of kept experts; the sets of different
    sizes are then no longer nested. `warning` is added to every plan that the criterion decides."""

    name: str
    needs: Needs
    order: OrderFunction
    refine: Refine | None = None
    warning: str = ""


CRITERIA = Registry(Criterion, "moeconv.criteria")


def criterion_aliases() -> dict[str, str]:
    """Other words for criteria -> the criterion."""
    return {"frequency": "utilization"}  # in the code of REAP


def criterion(
    name: str, *, needs: Needs, refine: Refine | None = None, warning: str = ""
) -> Callable[[OrderFunction], Criterion]:
    """Register a function `(evidence, layer, protected experts) -> Order` under a name. Raises ValueError if the name
    is taken."""

    def register(function: OrderFunction) -> Criterion:
        return CRITERIA.add(Criterion(name, needs, function, refine, warning))

    return register


def by_score(scores: np.ndarray, protected: frozenset[int]) -> Order:
    """The order of removal by one score per expert: the lowest score first, and of equal scores the highest index
    first."""
    ranked = sorted((float(s), -e) for e, s in enumerate(scores) if e not in protected)
    experts = tuple(-e for _, e in ranked)
    return Order(experts, tuple(s for s, _ in ranked), tuple(float(s) for s in scores))


def total(evidence: Evidence, layer: int, name: str) -> np.ndarray:
    """A field [S, E] summed over the data sources: [E]."""
    assert evidence.statistics is not None  # its `needs` require them
    return np.asarray(evidence.statistics.layer(layer, name), np.float64).sum(axis=0)


def measured(evidence: Evidence, layer: int) -> np.ndarray:
    """What the criterion's measure of the weights returned: float64 [E]."""
    assert evidence.weights is not None  # its `needs` require them
    return evidence.weights[layer]


def checked(scores: np.ndarray, layer: int) -> np.ndarray:
    """The scores, unchanged. Raises InputError for scores that cannot rank experts: NaN, infinite, or all zero."""
    if not np.isfinite(scores).all():
        raise InputError(f"the statistics of layer {layer} hold NaN or infinite values", hint="Calibrate again.")
    if not scores.any():
        raise InputError(
            f"the statistics of layer {layer} are all zero: no token reached an expert",
            hint="Calibrate on more or other text.",
        )
    return scores


# -- reconstruction ---------------------------------------------------------------------------------------------------


def sample_of(evidence: Evidence, layer: int) -> Reconstruction:
    """The token sample of the layer. Raises InputError if the statistics contain none."""
    if layer not in evidence.samples:
        assert evidence.statistics is not None and evidence.rule is not None
        names = ("sample_logits", "sample_outputs", "sample_scale", "sample_bias", "sample_factor", "sample_unit")
        try:
            logits, outputs, scale, bias, factor, unit = (evidence.statistics.layer(layer, name) for name in names)
        except InputError:
            raise InputError(
                f"the statistics hold no token sample of layer {layer}: they are older, or the router follows a rule "
                "that is not known",
                hint="Calibrate again, or pass --criterion saliency.",
            ) from None
        evidence.samples[layer] = Reconstruction(
            evidence.rule, logits, outputs.astype(np.float32) * unit[0], scale=scale, bias=bias, factor=float(factor[0])
        )
    return evidence.samples[layer]


def _swapped(evidence: Evidence, layer: int, protected: frozenset[int], kept: Sequence[int]) -> list[int]:
    assert evidence.rule is not None
    return sample_of(evidence, layer).refine(kept, protected, groups=evidence.rule.groups)


@criterion("reconstruction", needs=stats("count") | sample(), refine=_swapped)
def reconstruction(evidence: Evidence, layer: int, protected: frozenset[int]) -> Order:
    """Greedy: removes the expert whose absence changes the layer's output least, with tokens re-routed as the model
    would (NAEE, ACL 2024). The cost is the increase of the loss. Swaps then improve the set that stays."""
    checked(total(evidence, layer, "count"), layer)
    sample = sample_of(evidence, layer)
    experts, after = sample.order(protected)
    alone = sample.removals(list(range(sample.experts)), frozenset())
    scores = tuple(alone[e] for e in range(sample.experts))
    return Order(tuple(experts), tuple(float(b - a) for a, b in zip([0.0, *after], after)), scores)


# -- utilization and similarity together ------------------------------------------------------------------------------


def similarity(evidence: Evidence, layer: int) -> np.ndarray:
    """The cosine between every two experts, float64 [E, E]: of their outputs, of their weights (with neurons aligned,
    or raw), or of their router rows and logits (the smaller of the two)."""
    if evidence.similarity in OF_WEIGHTS:
        assert evidence.weight_cosine is not None  # measured on the weights before
        return np.array(evidence.weight_cosine[layer], np.float64)
    assert evidence.statistics is not None
    if evidence.similarity == "router":
        names = ("router_cosine", "logit_correlation")
        rows, logits = (np.asarray(evidence.statistics.layer(layer, n), np.float64) for n in names)
        return np.minimum(rows, logits)
    return np.array(evidence.statistics.layer(layer, "output_cosine"), np.float64)


@criterion("redundancy", needs=stats("gate_norm_sum", similarity=True))
def redundancy(evidence: Evidence, layer: int, protected: frozenset[int]) -> Order:
    """Utilization and cosine similarity together: saliency times (1 - the best cosine to an expert that stays).

    Greedy: after each removal, the most similar remaining expert is looked up again for all others.
    """
    weight = checked(total(evidence, layer, "gate_norm_sum"), layer)
    cosine = similarity(evidence, layer)
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


def stand_ins(evidence: Evidence, layer: int, order: Order, threshold: float) -> int:
    """The number of experts of an order that can be removed so that for each of them an expert with a similarity of at
    least `threshold` stays: the longest such beginning of the order."""
    cosine = similarity(evidence, layer)
    np.fill_diagonal(cosine, -1.0)
    found = 0
    for count in range(1, len(order.experts) + 1):
        gone = list(order.experts[:count])
        stay = [e for e in range(len(cosine)) if e not in gone]
        if stay and cosine[np.ix_(gone, stay)].max(axis=1).min() >= threshold:
            found = count
    return found


# -- N^a * mean(g^b * |f|^c), arXiv 2504.05586, 2510.13999, 2606.15716 ------------------------------------------------

_SUMS = {(0, 0): "count", (0, 1): "norm_sum", (0, 2): "norm_sq_sum", (1, 0): "gate_sum", (1, 1): "gate_norm_sum"}


def _power(name: str, description: str, *, a: float, b: int, c: int) -> None:
    def order(evidence: Evidence, layer: int, protected: frozenset[int]) -> Order:
        count = checked(total(evidence, layer, "count"), layer)
        summed = checked(total(evidence, layer, _SUMS[b, c]), layer)
        if (b, c) == (0, 0):
            return by_score(count**a, protected)
        mean = np.divide(summed, count, out=np.zeros_like(summed), where=count > 0)
        # the sum itself for a = 1: no rounding through the mean
        return by_score(summed if a == 1 else mean * count**a, protected)

    order.__doc__ = description
    criterion(name, needs=stats(*dict.fromkeys(("count", _SUMS[b, c]))))(order)


_power("saliency", "Sum of gate weight times output norm: all that the expert adds.", a=1, b=1, c=1)
_power("half-saliency", "Between reap and saliency: N^0.5 * mean(g |f|).", a=0.5, b=1, c=1)
_power("reap", "Mean of gate weight times output norm over the expert's tokens (arXiv 2510.13999).", a=0, b=1, c=1)
_power("utilization", "Tokens that were routed to the expert.", a=1, b=0, c=0)
_power("ean-sum", "Sum of output norms (arXiv 2504.05586).", a=1, b=0, c=1)
_power("man", "Mean output norm.", a=0, b=0, c=1)
_power("msan", "Mean squared output norm.", a=0, b=0, c=2)
_power("seer-soft", "Sum of gate weights.", a=1, b=1, c=0)


@criterion("easy-ep", needs=stats("easy_ep_sum"))
def easy_ep(evidence: Evidence, layer: int, protected: frozenset[int]) -> Order:
    """Sum of g |f| times the change of direction of the residual stream by the layer, 1 - cos(h, h + MoE(h)) (arXiv
    2504.06792)."""
    return by_score(checked(total(evidence, layer, "easy_ep_sum"), layer), protected)


# -- without data -----------------------------------------------------------------------------------------------------


def _evenness(expert: ExpertWeights) -> float:
    absolute, square, count = expert.sums().sum(axis=0)
    return float(absolute / count / np.sqrt(square / count)) if square else 1.0


@criterion(
    "aimer", needs=weights(_evenness),
    warning="aimer uses only the weights, which is unreliable on small or imbalanced models; calibrate if you can",
)  # fmt: skip
def aimer(evidence: Evidence, layer: int, protected: frozenset[int]) -> Order:
    """Weights only: mean|W| / sqrt(mean W^2) over gate, up and down. A high value means evenly spread weights, which
    count as dispensable. The highest value is removed first, so the score is its negative."""
    return by_score(-measured(evidence, layer), protected)


@criterion("magnitude", needs=weights(lambda expert: float(np.sqrt(expert.sums()[:, 1]).prod())))
def magnitude(evidence: Evidence, layer: int, protected: frozenset[int]) -> Order:
    """A baseline: the product of the Frobenius norms of gate, up and down."""
    return by_score(measured(evidence, layer), protected)


@criterion("random", needs=NOTHING)
def random(evidence: Evidence, layer: int, protected: frozenset[int]) -> Order:
    """A baseline: an order that is drawn from the seed."""
    scores = generator((evidence.seed, "prune", layer)).permutation(evidence.num_experts).astype(np.float64)
    return by_score(scores, protected)
