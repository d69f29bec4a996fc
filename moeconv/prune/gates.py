"""The loss that a prune costs, measured without writing a model: for --max-loss-increase, --curve and --top-k."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moeconv.contract import Cost
from moeconv.errors import UsageError
from moeconv.families.model import Model
from moeconv.plan.meter import Meter
from moeconv.plan.phases import phase
from moeconv.prune import choice, cutting, limits
from moeconv.prune.criteria import Evidence
from moeconv.prune.decision import Decision
from moeconv.prune.evidence import HELD_OUT_EVERY
from moeconv.prune.windows import read_windows, refit_of, stream_of
from moeconv.requests import PruneRequest

if TYPE_CHECKING:
    from moeconv.prune.scores import Score

AT_ONCE = 4  # sets of experts that are measured in one pass over the model


class KeepScorer:
    """Measures the loss of several sets of kept experts in one pass over the layers of the model."""

    def __init__(
        self, model: Model, evidence: Evidence, request: PruneRequest, *, meter: Meter, whole: bool = False
    ) -> None:
        """Read the data, and divide it into a part that decides and a held-out part that is measured. With `whole`,
        nothing is decided on the data, so that all of it is measured."""
        from moeconv.data.windows import TokenData, split_windows

        self.model, self.evidence, self.options, self.meter = model, evidence, request.prune, meter
        self.measure = request.measure
        read = read_windows(model, request)
        fit: TokenData | None = None
        if not self.options.stats and not whole:
            fit, read = split_windows(read, every=HELD_OUT_EVERY)
        elif (self.options.refit or self.options.mix) and not whole:
            # the statistics come from a file, so that one half refits and the other half is measured
            fit, read = split_windows(read, every=2)
        self.windows, self.source, self.names = read.windows, read.source, [s.name for s in read.sources]
        self.fit: np.ndarray | None = None
        if (self.options.refit or self.options.mix) and fit is not None:
            self.windows = np.concatenate([fit.windows, read.windows])
            self.source = np.concatenate([fit.source, read.source])
            self.fit = np.arange(len(self.windows)) < len(fit.windows)

    def scores(
        self, keeps: Sequence[Mapping[int, Sequence[int]]], *, widths: Sequence[int | None] | None = None
    ) -> list[Score]:
        """One Score per set of kept experts, over all data sources. `widths` are the neurons that the experts of each
        set keep; None: all."""
        from moeconv.prune.repair.variant import Variant
        from moeconv.prune.scores import score_variants, total

        refitted = max((len(kept) for keep in keeps for kept in keep.values()), default=0) if self.options.refit else 0
        stream = stream_of(
            self.model, self.windows, self.measure, meter=self.meter, refitted=refitted, variants=len(keeps),
            narrowed=max((len(kept) for keep in keeps for kept in keep.values()), default=0) if widths else 0,
            shared=bool(widths),
        )  # fmt: skip
        refit = refit_of(self.options) if self.options.refit else None
        variants = [
            Variant(
                keep=dict(k), refit=refit, width=width, top_k=self.options.top_k,
                scale=cutting.scales_of(self.model, k, self.evidence, self.options),
            )
            for k, width in zip(keeps, widths or [None] * len(keeps))
        ]  # fmt: skip
        scores = score_variants(stream, variants, source=self.source, num_sources=len(self.names), fit=self.fit)
        return [total(of_variant) for of_variant in scores]


@phase("search")
def smallest(
    model: Model, evidence: Evidence, request: PruneRequest, *, gate: float, meter: Meter
) -> tuple[dict[int, list[int]], dict[str, Cost]]:
    """({layer: kept experts}, {"measured": figures}) of the smallest prune that raises the loss by at most `gate` nats
    per token, found by bisection.

    Raises UsageError if the removal of one expert per layer already costs more.
    """
    options = request.prune
    orders = choice.orders_of(model, evidence, options, seed=request.plan.seed)
    assert orders is not None
    protected = choice.protected_experts(model, options, evidence)
    floor = max(options.top_k or model.top_k, max(len(p) for p in protected.values()), 1)
    counts = [left for left in range(floor, model.num_experts) if limits.feasible(model, left, options)]
    scorer = KeepScorer(model, evidence, request, meter=meter)
    measured: dict[int, Score] = {}
    sets: dict[int, dict[int, list[int]]] = {}
    low, high = 0, len(counts)  # counts[high:] pass the gate, counts[:low] do not
    while low < high:
        inside = min(AT_ONCE, high - low)
        tries = sorted({low + (high - low) * i // inside for i in range(inside)})
        for t in tries:
            sets[t] = choice.choose(
                model, orders, counts[t], evidence=evidence, criterion=str(options.criterion), protected=protected
            )
        for t, score in zip(tries, scorer.scores([sets[t] for t in tries])):
            measured[t] = score
        passing = [t for t in tries if increase(measured[t]) <= gate]
        failing = [t for t in tries if not increase(measured[t]) <= gate]
        low = max([low, *(t + 1 for t in failing)])
        high = min([high, *(t for t in passing if t >= low)])
    if low >= len(counts):
        least = increase(measured[len(counts) - 1]) if counts else math.nan
        raise UsageError(
            f"--max-loss-increase {gate}: the removal of one expert per layer already raises the loss by {least:.4f}",
            hint="Allow a larger increase, or pass --refit.",
        )
    return sets[low], {"measured": figures_of(measured[low])}


@phase("cost")
def cost(
    model: Model, evidence: Evidence, request: PruneRequest, decision: Decision, *, meter: Meter
) -> dict[str, Cost]:
    """What the removal of the experts and --top-k cost on --data: {"measured": figures}."""
    keep = decision.keep if decision.left != model.num_experts else {}
    (score,) = KeepScorer(model, evidence, request, meter=meter, whole=not keep).scores([keep])
    return {"measured": figures_of(score)}


def figures_of(score: Score) -> Cost:
    """The figures of a score in the result: losses and KL in nats per token."""
    return {
        "loss": score.mean("loss"), "reference_loss": score.mean("reference_loss"), "loss_increase": increase(score),
        "kl": score.mean("kl"), "tokens": score.tokens,
    }  # fmt: skip


def increase(score: Score) -> float:
    """The increase of the loss over the unpruned model, in nats per token."""
    return score.mean("loss") - score.mean("reference_loss")
