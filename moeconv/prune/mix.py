"""`prune --ratio R --mix auto`: how much of the removal is experts, and how much is neurons of those that stay.

A few points on the line of equal bytes, from experts alone to neurons alone, are judged on text that decided nothing.
The first one removes half of the ratio as experts: in benchmarks/prune.py it is the best or close to it.
"""

from __future__ import annotations

from dataclasses import dataclass

from moeconv.contract import MixRow
from moeconv.errors import UsageError
from moeconv.families.model import Model
from moeconv.families.neurons import Narrow
from moeconv.options import PlanOptions, PruneOptions
from moeconv.plan.meter import Meter
from moeconv.prune import choice
from moeconv.prune.criteria import Evidence
from moeconv.prune.cutting import Keep
from moeconv.prune.gates import KeepScorer, feasible, increase
from moeconv.prune.width import Width, multiple
from moeconv.requests import PruneRequest

_SHARES = (0.5, 1.0, 0.75, 0.25, 0.0)  # of the ratio, removed as experts


@dataclass(frozen=True)
class Mix:
    """The mix that was chosen: `keep` {layer: experts}, their `width` (None: all neurons), and the `rows` of all."""

    keep: Keep
    width: Width | None
    rows: list[MixRow]


def points(model: Model, options: PruneOptions, common: PlanOptions) -> list[tuple[int, int]]:
    """The (experts, neurons) per layer that are tried. Each has at most the bytes of the experts that --ratio leaves.

    Raises UsageError if there is no such point."""
    ratio, unit = options.ratio, multiple(model, options, common)
    assert ratio is not None
    experts, width = model.num_experts, model.expert_width
    found: list[tuple[int, int]] = []
    for share in _SHARES:
        left = experts - round(share * ratio * experts)
        left -= left % model.groups[0]
        most = (1 - ratio) * experts * width / max(1, left) + 1e-9
        neurons = width if most >= width else int(most // unit) * unit
        works = left == experts or feasible(model, left, options)
        if works and neurons and not (neurons < width and Narrow(model, neurons).ambiguous):
            found.append((left, neurons))
    if not found:
        raise UsageError(
            f"--mix: no number of experts and neurons has at most {1 - ratio:.0%} of the experts' bytes",
            hint="Pass a smaller --ratio, or a smaller --multiple.",
        )
    return list(dict.fromkeys(found))


def best_mix(model: Model, evidence: Evidence, request: PruneRequest, *, meter: Meter) -> Mix:
    """The point with the least loss on the held-out part of --data. Raises what the measurements raise."""
    options, common = request.prune, request.plan
    orders = choice.orders_of(model, evidence, options, seed=common.seed)
    assert orders is not None
    protected = choice.protected_experts(model, options, evidence)
    tried = points(model, options, common)
    keeps: list[Keep] = []
    for left, _ in tried:
        keeps.append(
            {layer: list(range(left)) for layer in model.moe_layers} if left == model.num_experts
            else choice.choose(
                model, orders, left, evidence=evidence, criterion=str(options.criterion), protected=protected
            )
        )  # fmt: skip
    meter.note(f"trying {len(tried)} mixes of experts and neurons")
    widths = [None if neurons == model.expert_width else neurons for _, neurons in tried]
    scores = KeepScorer(model, evidence, request, meter=meter).scores(keeps, widths=widths)
    best = min(range(len(tried)), key=lambda i: (increase(scores[i]), i))
    rows: list[MixRow] = [
        {"experts": left, "width": neurons, "loss_increase": increase(score), "kl": score.mean("kl"),
         "tokens": score.tokens, "chosen": i == best}
        for i, ((left, neurons), score) in enumerate(zip(tried, scores))
    ]  # fmt: skip
    return Mix(keeps[best], width_of(model, options, common, widths[best]), rows)


def width_of(model: Model, options: PruneOptions, common: PlanOptions, neurons: int | None) -> Width | None:
    """The width of a point; None if it keeps all neurons."""
    if neurons is None:
        return None
    return Width(model.expert_width, neurons, neurons, multiple(model, options, common))
