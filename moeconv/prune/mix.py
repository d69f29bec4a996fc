"""`prune --mix auto`: how much of the removal is experts, and how much is neurons of those that stay.

A few points of equal size, from experts alone to neurons alone, are judged on text that decided nothing. Under a limit
of the loss, the share of the experts' bytes that is removed is found by bisection; the best point decides each share.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moeconv.contract import Cost, MixRow
from moeconv.errors import UsageError
from moeconv.families.model import Model
from moeconv.options import PlanOptions, PruneOptions
from moeconv.plan.meter import Meter
from moeconv.plan.phases import phase
from moeconv.prune import choice
from moeconv.prune.criteria import Evidence, Order
from moeconv.prune.cutting import Keep
from moeconv.prune.gates import KeepScorer, figures_of, increase
from moeconv.prune.limits import planned_bytes
from moeconv.prune.points import Point, points, points_of
from moeconv.prune.width import Width, multiple
from moeconv.requests import PruneRequest

if TYPE_CHECKING:
    from moeconv.prune.scores import Score

_STEPS = 32  # of the share that is removed under a limit of the loss


@dataclass(frozen=True)
class Mix:
    """The mix that was chosen: `keep` {layer: experts}, their `width` (None: all neurons), the `rows` of all, and what
    the chosen one costs."""

    keep: Keep
    width: Width | None
    rows: list[MixRow]
    cost: Cost


@phase("search")
def best_mix(model: Model, evidence: Evidence, request: PruneRequest, *, meter: Meter) -> Mix:
    """The point of the --ratio or within --max-bytes that has the least loss on the held-out part of --data; with
    --max-loss-increase, the least of the smallest points whose loss is within the limit.

    Raises UsageError if there is no point, and what the measurements raise."""
    options, common = request.prune, request.plan
    search = MixSearch(model, evidence, request, meter)
    tried = points_of(model, options, common)
    if tried is None:
        assert options.max_loss_increase is not None
        best = _smallest(search, gate=options.max_loss_increase)
    else:
        meter.note(f"trying {len(tried)} mixes of experts and neurons")
        best = search.best(tried)
    left, neurons = best
    size = width_of(model, options, common, neurons)
    return Mix(search.keep(left), size, search.rows(chosen=best), figures_of(search.measured[best]))


def _smallest(search: MixSearch, *, gate: float) -> Point:
    """The best point of the largest share of the experts' bytes whose removal raises the loss by at most `gate`."""
    options, common = search.request.prune, search.request.plan
    tries: list[list[Point]] = []
    for step in range(1, _STEPS):
        try:
            tries.append(points(search.model, options, common, ratio=step / _STEPS))
        except UsageError:  # neither so few experts nor so few neurons are possible
            continue
    search.meter.note(f"searching among {len(tries)} shares of the experts' bytes")
    found: Point | None = None
    low, high = 0, len(tries)  # tries[:low] pass, tries[high:] do not
    while low < high:
        middle = (low + high) // 2
        best = search.best(tries[middle])
        if search.increase(best) <= gate:
            low, found = middle + 1, best
        else:
            high = middle
    if found is None:
        least = f"already raises the loss by {search.increase(search.best(tries[0])):.4f}" if tries else "is impossible"
        raise UsageError(
            f"--max-loss-increase {gate}: the removal of {1 / _STEPS:.0%} of the experts' bytes {least}",
            hint="Allow a larger increase, or pass --refit.",
        )
    return found


@dataclass(eq=False)
class MixSearch:
    """Measures points on the held-out part of --data, each of them once."""

    model: Model
    evidence: Evidence
    request: PruneRequest
    meter: Meter
    measured: dict[Point, Score] = field(default_factory=dict)
    _keeps: dict[int, Keep] = field(default_factory=dict)

    def __post_init__(self) -> None:
        found = choice.orders_of(self.model, self.evidence, self.request.prune, seed=self.request.plan.seed)
        assert found is not None
        self._orders: dict[int, Order] = found
        self._protected = choice.protected_experts(self.model, self.request.prune, self.evidence)
        self._scorer = KeepScorer(self.model, self.evidence, self.request, meter=self.meter)

    def keep(self, left: int) -> Keep:
        """The experts that stay, if `left` do."""
        if left == self.model.num_experts:
            return {layer: list(range(left)) for layer in self.model.moe_layers}
        if left not in self._keeps:
            self._keeps[left] = choice.choose(
                self.model, self._orders, left, evidence=self.evidence, criterion=str(self.request.prune.criterion),
                protected=self._protected,
            )  # fmt: skip
        return self._keeps[left]

    def best(self, tried: list[Point]) -> Point:
        """The point with the least loss; of equal ones, the first."""
        new = [point for point in tried if point not in self.measured]
        whole = self.model.expert_width
        widths = [None if neurons == whole else neurons for _, neurons in new]
        if new:
            scores = self._scorer.scores([self.keep(left) for left, _ in new], widths=widths)
            self.measured |= dict(zip(new, scores))
        return min(tried, key=self.increase)

    def increase(self, point: Point) -> float:
        """The increase of the loss, in nats per token."""
        return increase(self.measured[point])

    def rows(self, *, chosen: Point) -> list[MixRow]:
        """All points that were measured, in this order."""
        whole, common = self.model.expert_width, self.request.plan
        return [
            {"experts": left, "width": neurons,
             "bytes": planned_bytes(self.model, common, left, None if neurons == whole else neurons),
             "loss_increase": increase(score), "kl": score.mean("kl"), "tokens": score.tokens,
             "chosen": (left, neurons) == chosen}
            for (left, neurons), score in self.measured.items()
        ]  # fmt: skip


def width_of(model: Model, options: PruneOptions, common: PlanOptions, neurons: int | None) -> Width | None:
    """The width of a point; None if it keeps all neurons."""
    if neurons is None or neurons == model.expert_width:
        return None
    return Width(model.expert_width, neurons, neurons, multiple(model, options, common))
