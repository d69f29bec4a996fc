"""The decision which experts stay, as a value. Gates and repairs change it, and the plan is made from it once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from moeconv.families.model import Model
from moeconv.options import PlanOptions, PruneOptions
from moeconv.prune.choice import (
    checked_keep,
    choose,
    default_criterion,
    left_by_threshold,
    orders_of,
    predicted_keep,
    protected_experts,
)
from moeconv.prune.criteria import Evidence, Order
from moeconv.prune.cutting import Keep
from moeconv.prune.limits import check_feasible
from moeconv.prune.width import Width, asks_width, chosen_width

Groups = Mapping[int, Mapping[int, Sequence[int]]]


@dataclass(frozen=True)
class Decision:
    """The experts that stay: `left` in every layer, namely those of `keep` {layer: ids}.

    `known` is False if nothing was measured; the first experts are then placeholders, which give the same sizes.
    `orders` {layer: order of removal, with scores} are those of the criterion, if it decided alone. `groups` {layer:
    {kept: absorbed}} are the experts that a merge averages. `predicted` are the experts that stay in the
    multi-token-prediction layers that were measured. `width` is the number of neurons that every expert keeps (None:
    all of them).
    """

    left: int
    keep: Keep
    known: bool
    criterion: str
    orders: Mapping[int, Order] | None = None
    groups: Groups | None = None
    predicted: Keep = field(default_factory=dict)
    width: Width | None = None

    @property
    def all_kept(self) -> Keep:
        """The experts that stay in the model's own layers and in the measured prediction layers."""
        return {**self.keep, **self.predicted}


def decide(
    model: Model, options: PruneOptions, common: PlanOptions, evidence: Evidence, *, left: int | None,
    keep: Keep | None = None,
) -> Decision:  # fmt: skip
    """Decide by the evidence of the criterion, or take the experts `keep` that are already decided. The width is the
    one that the options state.

    `left` is what `limits.check_prune` returned: the number of experts per layer, or None if the evidence decides it.
    Raises UsageError for a budget that cannot be met or that nothing given decides, InputError for statistics that
    cannot rank experts (NaN, infinite, or all zero).
    """
    name, width = options.criterion or default_criterion(model, evidence), chosen_width(model, options, common)
    if keep is not None:
        left = len(next(iter(keep.values()), ())) if left is None else left
        _check(model, options, evidence, left)
        predicted = predicted_keep(model, evidence, options, left, criterion=name)
        return Decision(left, checked_keep(model, keep, left), True, name, predicted=predicted, width=width)
    orders = orders_of(model, evidence, options, seed=common.seed) if left != model.num_experts else None
    if left is None:
        left = left_by_threshold(model, options, evidence, orders)
    protected = _check(model, options, evidence, left)
    if orders is not None:
        chosen: Keep = choose(model, orders, left, evidence=evidence, criterion=name, protected=protected)
        predicted = predicted_keep(model, evidence, options, left, criterion=name)
        return Decision(left, chosen, True, name, orders, predicted=predicted, width=width)
    first = {layer: list(range(left)) for layer in model.moe_layers}
    return Decision(left, first, left == model.num_experts, name, width=width)


def with_keep(decision: Decision, keep: Keep, *, groups: Groups | None = None) -> Decision:
    """The decision, with other experts chosen or with experts merged."""
    return replace(decision, keep=keep, known=True, orders=None, groups=groups)


def _check(model: Model, options: PruneOptions, evidence: Evidence, left: int) -> Mapping[int, frozenset[int]]:
    """Raises UsageError for a number of experts that the router cannot have. Returns the protected experts."""
    protected = protected_experts(model, options, evidence)
    if left < model.num_experts or not (options.top_k is not None or asks_width(options)):
        check_feasible(model, left, protected, options.top_k or model.top_k)
    return protected
