"""Pruning criteria: a function each, from what was measured to an order of removal with a cost per removal.

A criterion's decorator says what it needs. Low scores go first; ties go to the higher index, so the order is total.
--criterion lists them in the order of this file; packages outside add theirs by the entry point moeconv.criteria.
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
    """What a statistics file gives: a field of one MoE layer as an array."""

    def layer(self, layer: int, field: str) -> np.ndarray: ...


@dataclass(frozen=True)
class Evidence:
    """What the criteria of a run may look at: statistics (with `rule`, the model's routing rule, for their token
    sample), {layer: array} measured on the weights, and the seed of what is random.

    `weights` {layer: float64 [E]} is what the criterion's own measure gave (`weights`, below); `weight_cosine` {layer:
    [E, E]} of the similarity "aligned" or "raw".
    """

    statistics: LayerStatistics | None = None
    weights: Mapping[int, np.ndarray] | None = None
    weight_cosine: Mapping[int, np.ndarray] | None = None
    rule: Rule | None = None
    similarity: str = "output"
    seed: int = 0
    num_experts: int = 0
    samples: dict[int, Reconstruction] = field(default_factory=dict, repr=False)  # of the layers looked at so far


@dataclass(frozen=True)
class Order:
    """One layer: experts in the order in which they go, what each removal costs, and every expert's score [E]."""

    experts: tuple[int, ...]
    costs: tuple[float, ...]
    scores: tuple[float, ...]


# -- what a criterion needs -------------------------------------------------------------------------------------------


class ExpertWeights(Protocol):
    """One expert's matrices, decoded and read a block at a time."""

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the matrix, some of its values in order: float32, flat)."""
        ...

    def sums(self) -> np.ndarray:
        """float64 [matrices, 3]: of every matrix the sum of |W|, the sum of W^2, and the number of values."""
        ...


WeightMeasure = Callable[[ExpertWeights], float]


@dataclass(frozen=True)
class Needs:
    """What must be measured before a criterion can decide. `fields` are those of the statistics that it reads, `sample`
    says that it reads their token sample, `similarity` that it calls `similarity`; `weights` is measured on every
    expert's weights and comes as `Evidence.weights`."""

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
    """Fields of the statistics (calibrate/statistics.py makes them): sums over tokens [sources, E] in the main."""
    return Needs(fields=(field, *more), similarity=similarity)


def sample() -> Needs:
    """The token sample of the statistics, as `sample_of` gives it."""
    return Needs(sample=True)


def weights(measure: WeightMeasure) -> Needs:
    """A number that `measure` gives for each expert from its weights alone, called once for each expert."""
    return Needs(weights=measure)


NOTHING = Needs()


# -- the registry -----------------------------------------------------------------------------------------------------

OrderFunction = Callable[[Evidence, int, frozenset[int]], Order]
Refine = Callable[[Evidence, int, frozenset[int], Sequence[int]], list[int]]


@dataclass(frozen=True)
class Criterion:
    """A criterion's function and what it needs. `refine` improves the kept set; the sets of
    different sizes are then no longer nested. `warning` goes with every plan that it decides."""

    name: str
    needs: Needs
    order: OrderFunction
    refine: Refine | None = None
    warning: str = ""


CRITERIA = Registry(Criterion, "moeconv.criteria")


def criterion(
    name: str, *, needs: Needs, refine: Refine | None = None, warning: str = ""
) -> Callable[[OrderFunction], Criterion]:
    """Register `(evidence, layer, protected experts) -> Order` under a name. Raises ValueError where it is taken."""

    def register(function: OrderFunction) -> Criterion:
        return CRITERIA.add(Criterion(name, needs, function, refine, warning))

    return register


def by_score(scores: np.ndarray, protected: frozenset[int]) -> Order:
    """The order that a score per expert means: lowest first, among equals the highest index first."""
    ranked = sorted((float(s), -e) for e, s in enumerate(scores) if e not in protected)
    experts = tuple(-e for _, e in ranked)
    return Order(experts, tuple(s for s, _ in ranked), tuple(float(s) for s in scores))


def total(evidence: Evidence, layer: int, name: str) -> np.ndarray:
    """A field [S, E] summed over the data sources: [E]."""
    assert evidence.statistics is not None  # as its `needs` say
    return np.asarray(evidence.statistics.layer(layer, name), np.float64).sum(axis=0)


def measured(evidence: Evidence, layer: int) -> np.ndarray:
    """What the criterion's measure of the weights gave: float64 [E]."""
    assert evidence.weights is not None  # as its `needs` say
    return evidence.weights[layer]


def checked(scores: np.ndarray, layer: int) -> np.ndarray:
    """Scores that say something. Raises InputError for NaN, infinite or all-zero ones."""
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
    """The layer's token sample. Raises InputError where the statistics hold none."""
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
    """Greedy: the expert goes whose absence changes the layer's output least, tokens re-routed as the model would
    (NAEE, ACL 2024); costs are what the loss grows by. The set that stays is bettered by swaps."""
    checked(total(evidence, layer, "count"), layer)
    sample = sample_of(evidence, layer)
    experts, after = sample.order(protected)
    alone = sample.removals(list(range(sample.experts)), frozenset())
    scores = tuple(alone[e] for e in range(sample.experts))
    return Order(tuple(experts), tuple(float(b - a) for a, b in zip([0.0, *after], after)), scores)


# -- utilization and similarity together ------------------------------------------------------------------------------


def similarity(evidence: Evidence, layer: int) -> np.ndarray:
    """Cosine of every two experts [E, E]: of their outputs, their weights (neurons aligned or raw), or their router
    rows and logits (the smaller of the two)."""
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
    """Utilization and cosine similarity together: saliency times (1 - best cosine to an expert that stays).

    Greedy: after each removal the stand-ins of the others are looked up again among those that are left.
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
    """How many experts of an order can go so that each has a stand-in of similarity `threshold` among those that
    stay: the longest such beginning of the order."""
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


def _power(name: str, says: str, *, a: float, b: int, c: int) -> None:
    def order(evidence: Evidence, layer: int, protected: frozenset[int]) -> Order:
        count = checked(total(evidence, layer, "count"), layer)
        summed = checked(total(evidence, layer, _SUMS[b, c]), layer)
        if (b, c) == (0, 0):
            return by_score(count**a, protected)
        mean = np.divide(summed, count, out=np.zeros_like(summed), where=count > 0)
        # the sum itself for a = 1: no rounding through the mean
        return by_score(summed if a == 1 else mean * count**a, protected)

    order.__doc__ = says
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
    """Sum of g |f| times how much the layer turns the residual stream, 1 - cos(h, h + MoE(h)) (arXiv 2504.06792)."""
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
    """Weights only: mean|W| / sqrt(mean W^2) over gate, up and down. High means spread evenly, which is taken for
    dispensable: the highest goes first, so its negative is the score."""
    return by_score(-measured(evidence, layer), protected)


@criterion("magnitude", needs=weights(lambda expert: float(np.sqrt(expert.sums()[:, 1]).prod())))
def magnitude(evidence: Evidence, layer: int, protected: frozenset[int]) -> Order:
    """A baseline: the product of the Frobenius norms of gate, up and down."""
    return by_score(measured(evidence, layer), protected)


@criterion("random", needs=NOTHING)
def random(evidence: Evidence, layer: int, protected: frozenset[int]) -> Order:
    """A baseline: an order that the seed decides."""
    scores = generator((evidence.seed, "prune", layer)).permutation(evidence.num_experts).astype(np.float64)
    return by_score(scores, protected)
