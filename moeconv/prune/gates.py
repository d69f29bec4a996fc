"""What a prune costs, measured without writing a model: the gate of --max-loss-increase and the figures beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moeconv.errors import UsageError
from moeconv.families.model import Model
from moeconv.options import MeasureOptions, PruneOptions, take
from moeconv.plan.meter import Meter
from moeconv.prune import choice, cutting, limits, planner
from moeconv.prune.criteria import Evidence
from moeconv.prune.evidence import JUDGE_EVERY
from moeconv.prune.windows import read_windows, refit_of, stream_of

AT_ONCE = 4  # ratios measured in one pass while a gate is searched


class Judge:
    """Measures plans of several sizes in one pass over the model's layers."""

    def __init__(
        self, model: Model, evidence: Evidence, values: Mapping[str, Any], *, meter: Meter, whole: bool = False
    ) -> None:
        """`whole`: nothing is decided on the data, so that all of it judges."""
        from moeconv.data.windows import TokenData, split_windows

        self.model, self.evidence, self.options, self.meter = model, evidence, take(PruneOptions, values), meter
        self.measure = take(MeasureOptions, values)
        read = read_windows(model, values)
        fit: TokenData | None = None
        if not self.options.stats and not whole:
            fit, read = split_windows(read, every=JUDGE_EVERY)
        elif self.options.refit and not whole:
            fit, read = split_windows(read, every=2)  # the statistics come from elsewhere: half fits, half judges
        self.windows, self.source, self.names = read.windows, read.source, [s.name for s in read.sources]
        self.fit: np.ndarray | None = None
        if self.options.refit and fit is not None:
            self.windows = np.concatenate([fit.windows, read.windows])
            self.source = np.concatenate([fit.source, read.source])
            self.fit = np.arange(len(self.windows)) < len(fit.windows)

    def scores(self, keeps: Sequence[Mapping[int, Sequence[int]]]) -> list[Any]:
        """A Score for each keep set, over all sources."""
        from moeconv.prune.repair.pruned import Variant
        from moeconv.prune.scores import score_variants, total

        stream = stream_of(self.model, self.windows, self.measure, meter=self.meter)
        refit = refit_of(self.options) if self.options.refit else None
        variants = [
            Variant(
                keep=dict(k), refit=refit, top_k=self.options.top_k,
                scale=cutting.scales_of(self.model, k, self.evidence, self.options),
            )
            for k in keeps
        ]  # fmt: skip
        scores = score_variants(stream, variants, source=self.source, num_sources=len(self.names), fit=self.fit)
        return [total(of_variant) for of_variant in scores]


def decided(
    model: Model, evidence: Evidence, values: Mapping[str, Any], parameters: Mapping[str, Any], *, meter: Meter
) -> tuple[dict[int, list[int]] | None, dict[str, Any]]:
    """The keep sets that a gate leaves, with what was measured; None where the planner decides alone."""
    options = take(PruneOptions, values)
    gate = options.max_loss_increase
    if gate is None:
        return None, {}
    orders = choice.orders_of(model, evidence, **parameters)
    assert orders is not None
    protected = choice.protected_experts(model, options, evidence)
    floor = max(options.top_k or model.top_k, max(len(p) for p in protected.values()), 1)
    counts = [left for left in range(floor, model.num_experts) if feasible(model, left, parameters)]
    judge = Judge(model, evidence, values, meter=meter)
    measured: dict[int, Any] = {}
    sets: dict[int, dict[int, list[int]]] = {}
    low, high = 0, len(counts)  # counts[high:] pass, counts[:low] do not
    while low < high:
        inside = min(AT_ONCE, high - low)
        tries = sorted({low + (high - low) * i // inside for i in range(inside)})
        for t in tries:
            sets[t] = choice.choose(
                model, orders, counts[t], evidence=evidence, criterion=parameters["criterion"], protected=protected
            )
        for t, score in zip(tries, judge.scores([sets[t] for t in tries])):
            measured[t] = score
        passing = [t for t in tries if increase(measured[t]) <= gate]
        failing = [t for t in tries if not increase(measured[t]) <= gate]
        low = max([low, *(t + 1 for t in failing)])
        high = min([high, *(t for t in passing if t >= low)])
    if low >= len(counts):
        least = increase(measured[len(counts) - 1]) if counts else math.nan
        raise UsageError(
            f"--max-loss-increase {gate}: removing a single expert per layer already raises the loss by {least:.4f}",
            hint="Allow more, or pass --refit.",
        )
    return sets[low], {"measured": figures_of(measured[low])}


def cost(
    model: Model, evidence: Evidence, values: Mapping[str, Any], parameters: Mapping[str, Any], *, meter: Meter
) -> dict[str, Any]:
    """What the planned experts and --top-k do to the loss on --data."""
    left, keep = limits.check_prune(model, **parameters), dict[int, list[int]]()
    if left != model.num_experts:
        block = planner.plan_prune(model, evidence=evidence, **parameters).block
        keep = {int(layer): list(kept) for layer, kept in block["keep"].items()}
    (score,) = Judge(model, evidence, values, meter=meter, whole=not keep).scores([keep])
    return {"measured": figures_of(score)}


def figures_of(score: Any) -> dict[str, Any]:
    """What a result says of a score: losses and KL in nats per token."""
    return {
        "loss": score.mean("loss"), "reference_loss": score.mean("reference_loss"), "loss_increase": increase(score),
        "kl": score.mean("kl"), "tokens": score.tokens,
    }  # fmt: skip


def increase(score: Any) -> float:
    """The increase of the loss over the unpruned model, in nats per token."""
    return score.mean("loss") - score.mean("reference_loss")


def feasible(model: Model, left: int, parameters: Mapping[str, Any]) -> bool:
    """Whether `left` experts can be kept with these parameters."""
    sized = dict(parameters) | {"keep": left, "max_loss_increase": None}
    try:
        limits.check_prune(model, **sized)
    except UsageError:
        return False
    return True
