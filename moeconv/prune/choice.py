"""Which experts stay: the order of removal of a criterion, cut off at the budget, without the protected experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from moeconv.errors import InputError, UsageError, did_you_mean, escape
from moeconv.families.model import Model
from moeconv.families.rule import has_numbers, rule_of
from moeconv.options import PruneOptions, flag_of
from moeconv.prune.criteria import CRITERIA, OF_WEIGHTS, Criterion, Evidence, Order, similarity, stand_ins
from moeconv.prune.cutting import Keep
from moeconv.prune.limits import parse_protect
from moeconv.units import counted

DEFAULT = "reconstruction"  # the best criterion in benchmarks/prune.py
_WITHOUT_RULE = "saliency"  # if the routing rule is not known, so that tokens cannot be routed again without an expert
_WITHOUT_DATA = "aimer"


def resolve_criterion(name: str | None, *, has_data: bool, model: Model | None = None) -> str:
    """The criterion of a run: the one that the user named, or else the best one that the model's routing rule allows.
    Raises UsageError if it needs statistics and there are none."""
    best = DEFAULT if model is None or has_numbers(model) else _WITHOUT_RULE
    chosen = name or (best if has_data else _WITHOUT_DATA)
    if chosen not in CRITERIA:
        raise UsageError(f"unknown --criterion {escape(chosen)}", hint=did_you_mean(chosen, CRITERIA))
    if CRITERIA[chosen].needs.data and not has_data:
        raise UsageError(
            f"--criterion {chosen} needs statistics",
            hint="Pass --data FILE, or --stats STATS from `moeconv calibrate MODEL STATS --data FILE`.",
        )
    return chosen


def with_default(options: PruneOptions, *, has_data: bool, model: Model) -> PruneOptions:
    """The options with the criterion of the run, as `resolve_criterion` returns it. A dense model has none."""
    if not model.num_experts:
        return options
    return replace(options, criterion=resolve_criterion(options.criterion, has_data=has_data, model=model))


def check_used(options: PruneOptions, criterion: str, *, has_data: bool) -> None:
    """Raises UsageError for an option that neither the criterion nor a repair uses."""
    uses = CRITERIA[criterion].needs.similarity or options.merge or options.threshold is not None
    if options.similarity != PruneOptions().similarity and not uses:
        raise UsageError(
            f"--criterion {criterion} does not use --similarity",
            hint="Leave --similarity out, or pass --criterion redundancy or --merge.",
        )
    if options.rescale and not has_data:
        raise UsageError(
            "--rescale needs statistics", hint="Pass --data FILE, or --stats STATS, or leave --rescale out."
        )


def default_criterion(model: Model, evidence: Evidence) -> str:
    """The criterion if the user named none: one that reads only weights if there are no statistics, otherwise the best
    one in the benchmark, or `saliency` if the statistics contain no token sample (the router's rule is not known, or
    the file is older)."""
    if evidence.statistics is None:
        return _WITHOUT_DATA
    try:
        evidence.statistics.layer(model.moe_layers[0], "sample_unit")
    except (InputError, KeyError):
        return _WITHOUT_RULE
    return DEFAULT


def orders_of(model: Model, evidence: Evidence, options: PruneOptions, *, seed: int) -> dict[int, Order] | None:
    """The order of removal of every layer, or None if the evidence was not measured (in a dry run)."""
    name = options.criterion or default_criterion(model, evidence)
    evidence = replace(
        evidence, rule=rule_of(model), similarity=options.similarity, num_experts=model.num_experts,
        seed=seed,
    )  # fmt: skip
    if not _measured(CRITERIA[name], evidence):
        return None
    protected = protected_experts(model, options, evidence)
    return {layer: CRITERIA[name].order(evidence, layer, protected[layer]) for layer in model.moe_layers}


def predicted_keep(
    model: Model, evidence: Evidence, options: PruneOptions, left: int, *, criterion: str
) -> dict[int, list[int]]:
    """The experts that stay in the multi-token-prediction layers that were measured, by the criterion if it reads
    statistics alone. What is protected in the last of the model's own layers is protected there too."""
    needs, found = CRITERIA[criterion].needs, evidence.statistics
    layers = [layer for layer in model.mtp_layers if layer in getattr(found, "prediction_layers", ())]
    by_weights = needs.weights is not None or (needs.similarity and evidence.similarity in OF_WEIGHTS)
    if left == model.num_experts or not layers or not needs.data or by_weights:
        return {}
    evidence = replace(evidence, rule=rule_of(model), similarity=options.similarity, num_experts=model.num_experts)
    fixed = protected_experts(model, options, evidence)[model.moe_layers[-1]]
    protected = dict.fromkeys(layers, fixed)
    orders = {layer: CRITERIA[criterion].order(evidence, layer, fixed) for layer in layers}
    return choose(model, orders, left, evidence=evidence, criterion=criterion, protected=protected)


def _measured(criterion: Criterion, evidence: Evidence) -> bool:
    """Whether everything that a criterion needs was measured."""
    needs = criterion.needs
    if needs.similarity and evidence.similarity in OF_WEIGHTS and evidence.weight_cosine is None:
        return False
    if needs.weights is not None and evidence.weights is None:
        return False
    return evidence.statistics is not None or not needs.data


def choose(
    model: Model, orders: Mapping[int, Order], left: int, *, evidence: Evidence, criterion: str,
    protected: Mapping[int, frozenset[int]], nested: bool = False,
) -> dict[int, list[int]]:  # fmt: skip
    """The experts that stay in every layer. The same number is removed from each group of the router. `nested` leaves
    out the refinement, so that the sets of a smaller budget are subsets of those of a larger one."""
    keep = {}
    groups, _ = model.groups
    size, away = model.num_experts // groups, (model.num_experts - left) // groups
    evidence = replace(evidence, rule=rule_of(model))
    refine = None if nested else CRITERIA[criterion].refine
    for layer, order in orders.items():
        gone: set[int] = set()
        for group in range(groups):
            gone |= set([e for e in order.experts if e // size == group][:away])
        if len(gone) != model.num_experts - left:
            raise UsageError(
                f"layer {layer}: {counted(model.num_experts - left, 'expert')} must be removed, "
                f"and only {len(gone)} can be",
                hint="Protect fewer experts, or remove fewer.",
            )
        keep[layer] = [e for e in range(model.num_experts) if e not in gone]
        if refine is not None:
            keep[layer] = refine(evidence, layer, protected[layer], keep[layer])
    return keep


def protected_experts(model: Model, options: PruneOptions, evidence: Evidence) -> dict[int, frozenset[int]]:
    """The experts that --protect names, and those of --protect-coverage: for every data source, the experts with the
    largest sums of g |f| that together make up the share. Without statistics, only --protect applies. Raises InputError
    for all-zero statistics."""
    protected = parse_protect(options.protect, model)
    if options.protect_coverage is None or evidence.statistics is None:
        return protected
    for layer in model.moe_layers:
        chosen = set(protected[layer])
        for of_source in np.asarray(evidence.statistics.layer(layer, "gate_norm_sum"), np.float64):
            ranked = np.argsort(-of_source, kind="stable")
            share = np.cumsum(of_source[ranked]) / max(float(of_source.sum()), 1e-300)
            count = int(np.searchsorted(share, options.protect_coverage * (1 - 1e-12)) + 1)
            chosen |= set(ranked[:count].tolist()) if of_source.any() else set()
        protected[layer] = frozenset(chosen)
    return protected


def groups_of(model: Model, evidence: Evidence, keep: Keep, options: PruneOptions) -> dict[int, dict[int, list[int]]]:
    """{layer: {kept expert: the dropped ones that it absorbs}}. Each dropped expert goes to the most similar kept one:
    by the mean of the similarities of outputs and router logits, as in REAM, or by the --similarity that was asked
    for."""
    evidence = replace(evidence, similarity=options.similarity)
    groups: dict[int, dict[int, list[int]]] = {}
    for layer, kept in keep.items():
        cosine = similarity(evidence, layer)
        if options.similarity == "output":
            assert evidence.statistics is not None
            cosine = (cosine + evidence.statistics.layer(layer, "logit_correlation")) / 2
        groups[layer] = {e: [] for e in kept}
        for e in range(model.num_experts):
            if e not in groups[layer]:
                groups[layer][max(kept, key=lambda other: (cosine[e, other], -other))].append(e)
    return groups


def left_by_threshold(
    model: Model, options: PruneOptions, evidence: Evidence, orders: Mapping[int, Order] | None
) -> int:
    """The number of experts left if in every layer only experts with a similar enough stand-in are removed. The layer
    that can remove the fewest decides for all layers."""
    if options.threshold is None or orders is None or evidence.statistics is None:
        flag = next((n for n in ("threshold", "mix") if getattr(options, n) is not None), "max_loss_increase")
        raise UsageError(
            f"{flag_of(flag)} needs measurements to decide how many experts are removed",
            hint="Pass --stats STATS, or run without --dry-run and with --data FILE."
            if flag == "threshold"
            else "Run without --dry-run and with --data FILE; `moeconv prune MODEL --curve` shows all ratios."
            if flag == "max_loss_increase"
            else "Run without --dry-run and with --data FILE, or state the mix: --keep N --width W.",
        )
    evidence = replace(evidence, similarity=options.similarity)
    counts = {layer: stand_ins(evidence, layer, order, options.threshold) for layer, order in orders.items()}
    removed = min(min(counts.values()), model.num_experts - (options.top_k or model.top_k))
    removed -= removed % model.groups[0]
    if removed == 0:
        at = min(counts, key=lambda layer: counts[layer])
        raise UsageError(
            f"--threshold {options.threshold}: no expert of layer {at} has another expert that is so similar to it",
            hint="Experts that were trained separately are rarely similar: pass --ratio, or a lower --threshold.",
        )
    return model.num_experts - removed


def checked_keep(model: Model, keep: Keep, left: int) -> dict[int, list[int]]:
    """The experts to keep, sorted in each layer.

    Raises UsageError unless there are `left` different experts in every MoE layer, the same number from each group.
    """
    if set(keep) != set(model.moe_layers):
        raise UsageError("keep_experts must name every MoE layer", hint=f"Layers: {list(model.moe_layers)}.")
    for layer, kept in keep.items():
        if len(kept) != left or len(set(kept)) != left or not all(0 <= e < model.num_experts for e in kept):
            raise UsageError(f"keep_experts of layer {layer} must name {left} different experts")
        groups, size = model.groups[0], model.num_experts // model.groups[0]
        if any(sum(e // size == g for e in kept) != left // groups for g in range(groups)):
            raise UsageError(f"keep_experts of layer {layer} must name equally many of each of {groups} groups")
    return {layer: sorted(keep[layer]) for layer in model.moe_layers}
