"""plan_prune: an MoE, a budget and a criterion's evidence in, a Plan out. No torch, no tensor bytes.

Without evidence the plan keeps the first experts as a placeholder: its sizes are exact, its `keep` is null.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from moeconv.checkpoint.header import FLOAT_DTYPES
from moeconv.checkpoint.reader import SafetensorsFile, TensorRef
from moeconv.errors import InputError, UsageError, escape
from moeconv.families.model import Model
from moeconv.families.rule import has_numbers, rule_of
from moeconv.families.served import check_served
from moeconv.families.spec import with_expert
from moeconv.options import (
    PlanOptions,
    PruneOptions,
    check_names,
    did_you_mean,
    flag_of,
    parameters_of,
    parse_index,
    parse_size,
    take,
)  # fmt: skip
from moeconv.plan.arrange import arrange
from moeconv.plan.build import TORCH_NAMES, carry, carry_all, count_planned, parse_dtype, pick_rows, whole
from moeconv.plan.overlay import fingerprint
from moeconv.plan.plan import Item, Plan, TensorSpec
from moeconv.prune.criteria import CRITERIA, Criterion, Evidence, Order, sample_of, similarity, stand_ins

Keep = Mapping[int, Sequence[int]]

DEFAULT = "reconstruction"  # what wins in benchmarks/prune.py
_RANKS = (2, 4, 8)  # devices that experts are commonly spread over
_WITHOUT_RULE = "saliency"  # where no rule in numbers says what tokens do without an expert
BUDGETS = ("keep", "ratio", "max_bytes", "threshold", "max_loss_increase")


def resolve_criterion(name: str | None, *, has_data: bool, model: Model | None = None) -> str:
    """The criterion of a run; without one that the user names, one that the model's routing rule allows. Raises
    UsageError when it needs statistics that are not given."""
    best = DEFAULT if model is None or has_numbers(model) else _WITHOUT_RULE
    chosen = name or (best if has_data else "aimer")
    if chosen not in CRITERIA:
        raise UsageError(f"unknown --criterion {escape(chosen)}", hint=did_you_mean(chosen, CRITERIA))
    if CRITERIA[chosen].needs_data and not has_data:
        raise UsageError(
            f"--criterion {chosen} needs statistics",
            hint="Pass --data FILE, or --stats STATS from `moeconv calibrate MODEL STATS --data FILE`.",
        )
    return chosen


def default_criterion(model: Model, evidence: Evidence) -> str:
    """What decides when nothing is asked for: by the weights without statistics, else the benchmark's winner, or
    `saliency` where the statistics hold no token sample (a router whose rule is not known, or an older file)."""
    if evidence.statistics is None:
        return "aimer"
    try:
        evidence.statistics.layer(model.moe_layers[0], "sample_unit")
    except (InputError, KeyError):
        return "saliency"
    return DEFAULT


def check_prune(model: Model, **parameters: Any) -> int | None:
    """Everything that can be refused before anything is measured. Returns the experts left per layer, None where the
    data decides them (--threshold, --max-loss-increase). Raises UsageError and InputError."""
    check_names(parameters, PruneOptions, PlanOptions)
    options, common = take(PruneOptions, parameters), take(PlanOptions, parameters)
    if model.family.kind != "moe":
        raise InputError(f"{model.family.model_type} has no experts to prune", hint="Give a Mixture-of-Experts.")
    _check_quantized(model, options, common)
    if not model.moe_layers:
        raise InputError("config.json makes no layer a Mixture-of-Experts", hint="There is nothing to prune.")
    check_served(model.family.model_type, options.target)
    protected = parse_protect(options.protect, model)
    left = budget(model, options, common)
    _check_numbers(options)
    _check_top_k(model, options, left)
    if left is not None and not (options.top_k is not None and left == model.num_experts):
        _check_feasible(model, left, protected, options.top_k or model.top_k)
    return left


def plan_prune(
    model: Model,
    *,
    evidence: Evidence | None = None,
    keep_experts: Keep | None = None,
    overlays: Mapping[str, SafetensorsFile] | None = None,
    groups: Mapping[int, Mapping[int, Sequence[int]]] | None = None,
    **parameters: Any,
) -> Plan:
    """Plan the removal of experts; parameters are the fields of PruneOptions and PlanOptions.

    `keep_experts` {layer: kept ids} overrides criterion and budget. `overlays` {origin: file} hold tensors named as in
    the result that take the place of the sliced ones (refitted, merged, tuned); run the plan with them as `origins`.
    `groups` {layer: {kept: absorbed}} go into the block. Raises UsageError for a budget that cannot be met or that
    nothing given decides, InputError for evidence that says nothing.
    """
    left = check_prune(model, **parameters)
    options, common = take(PruneOptions, parameters), take(PlanOptions, parameters)
    evidence = evidence or Evidence()
    name = options.criterion or default_criterion(model, evidence)
    orders: dict[int, Order] | None = None
    if keep_experts is None and left != model.num_experts:
        orders = orders_of(model, evidence, **parameters)
    if keep_experts is not None:
        left = len(next(iter(keep_experts.values()), ())) if left is None else left
    elif left is None:
        left = _left_by_threshold(model, options, evidence, orders)
    protected = protected_experts(model, options, evidence)
    if left < model.num_experts or options.top_k is None:
        _check_feasible(model, left, protected, options.top_k or model.top_k)
    keep: Keep
    if keep_experts is not None:
        keep = _checked_keep(model, keep_experts, left)
    elif orders is not None:
        keep = choose(model, orders, left, evidence=evidence, criterion=name, protected=protected)
    else:
        keep = {layer: list(range(left)) for layer in model.moe_layers}
    known = keep_experts is not None or orders is not None or left == model.num_experts
    scales = scales_of(model, keep, evidence, options) if left < model.num_experts and not overlays else {}
    items = _scaled(model, _items(model, keep, parse_dtype(common.dtype)), scales)
    items = _replaced(items, overlays or {})
    top_k = options.top_k or model.top_k
    total, active = count_planned(items, top_k=top_k, num_experts=left)
    block: dict[str, Any] = {
        "criterion": None if left == model.num_experts else name,
        "experts_before": model.num_experts,
        "experts_after": left,
        "keep": {str(layer): list(kept) for layer, kept in keep.items()} if known else None,
        "scores": {str(layer): list(o.scores) for layer, o in orders.items()} if orders else None,
    }
    if options.top_k is not None:
        block |= {"top_k_before": model.top_k, "top_k_after": options.top_k}
    if scales:
        block["scale"] = {str(layer): scale for layer, scale in scales.items()}
    if groups is not None:
        block["groups"] = {str(at): {str(e): list(into) for e, into in g.items()} for at, g in groups.items()}
    prints = {"overlays": {origin: fingerprint(file) for origin, file in overlays.items()}} if overlays else {}
    return Plan(
        command="prune",
        parameters=parameters_of(options, common) | _decided_by(evidence, options, block) | prints,
        identity=model.identity,
        config=_config(model, left, parse_dtype(common.dtype), options.top_k),
        shards=arrange(items, common, model.family),
        params_total=total,
        params_active=active,
        block=block,
        warnings=(
            *model.checkpoint.warnings,
            *_warnings(model, "" if left == model.num_experts else name, options, scales, left),
        ),
        dropped=model.dropped,
        promise=_promise(model, left),
    )


def _decided_by(evidence: Evidence, options: PruneOptions, block: Mapping[str, Any]) -> dict[str, Any]:
    """What goes into the manifest beside the options: the data behind the statistics and the keep sets, by their
    hashes; a path would say nothing elsewhere."""
    keep, metadata = block["keep"], getattr(evidence.statistics, "metadata", None)
    found: dict[str, Any] = {"criterion": block["criterion"]}
    if keep is not None and block["criterion"] is not None:
        found["keep_sha256"] = hashlib.sha256(json.dumps(keep, sort_keys=True).encode()).hexdigest()
    if metadata is not None:
        found["data_sha256"] = [s.get("sha256") for s in metadata["sources"] if isinstance(s, Mapping)]
        found |= {name: metadata[name] for name in ("tokens", "seq_len") if name in metadata}
    stats = (
        None
        if options.stats is None or metadata is None
        else hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode()).hexdigest()
    )
    return {"stats": stats, "decided_by": found}


def _check_quantized(model: Model, options: PruneOptions, common: PlanOptions) -> None:
    """A quantized source is cut as it lies on disk: nothing of it can be cast, and its config names no expert."""
    if model.quantization is None:
        return
    if common.dtype:
        raise UsageError(
            "--dtype cannot cast a quantized source", hint="Leave it out: codes and scales stay as stored."
        )
    for name in ("refit", "merge", "rescale", "distill"):
        if getattr(options, name):
            raise UsageError(
                f"{flag_of(name)} changes weights, and this source's are quantized",
                hint="Leave it out, or prune the unquantized checkpoint and quantize the result.",
            )
    for key in ("ignore", "modules_to_not_convert"):
        for word in model.quantization.get(key) or ():
            if isinstance(word, str) and re.search(r"experts\.\d", word):
                raise InputError(
                    f"config.json: quantization_config.{key} names single experts ({escape(word)[:80]}), which a prune "
                    "renumbers",
                    hint="Prune the unquantized checkpoint.",
                )


def _promise(model: Model, left: int) -> dict[str, int]:
    """Tensors that change by role: those of the kept experts, and every one that has an entry for each expert."""
    counts = {"expert": 0, "router": 0}
    for role in model.roles.values():
        if role.group in counts:
            counts[role.group] += role.expert is None or role.expert < left
    return counts


def budget(model: Model, options: PruneOptions, common: PlanOptions) -> int | None:
    """Experts left in every layer, from exactly one of --keep, --ratio, --max-bytes, --threshold and
    --max-loss-increase; None for the last two, all of them for --top-k alone. Raises UsageError."""
    given = [f for f in BUDGETS if getattr(options, f) is not None]
    if options.top_k is not None and not given:
        return model.num_experts
    if len(given) != 1:
        raise UsageError(
            "give exactly one of --keep, --ratio, --max-bytes, --threshold and --max-loss-increase"
            + (f", not {len(given)}" if given else ""),
            hint="For half of the experts: --ratio 0.5.",
        )
    experts = model.num_experts
    if given[0] in ("threshold", "max_loss_increase"):
        return None
    if options.keep is not None:
        return options.keep
    if options.ratio is not None:
        if not 0 < options.ratio < 1:
            raise UsageError(f"--ratio {options.ratio} must lie between 0 and 1", hint="For half: --ratio 0.5.")
        removed = round(options.ratio * experts)
        if removed == 0:
            raise UsageError(
                f"--ratio {options.ratio} of {experts} experts rounds to none", hint=f"The least is {1 / experts:.3f}."
            )
        return experts - removed
    limit = parse_size(str(options.max_bytes), flag="--max-bytes")
    for left in range(experts - 1, 0, -1):
        keep = {layer: list(range(left)) for layer in model.moe_layers}
        shards = arrange(_items(model, keep, parse_dtype(common.dtype)), common, model.family)
        if sum(s.nbytes for s in shards) <= limit:
            return left
    raise UsageError(f"--max-bytes {escape(options.max_bytes)}: too small even with one expert per layer")


def _check_numbers(options: PruneOptions) -> None:
    """Raises UsageError for options that make no sense together or by themselves."""
    for name in ("threshold", "protect_coverage"):
        value = getattr(options, name)
        if value is not None and not 0 < value <= 1:
            raise UsageError(f"{flag_of(name)} {value} must lie between 0 and 1", hint=f"Example: {flag_of(name)} 0.8.")
    gate = options.max_loss_increase
    if gate is not None and not (math.isfinite(gate) and gate >= 0):
        raise UsageError(f"--max-loss-increase {gate}: a number of nats per token from 0 up")
    if not (math.isfinite(options.refit_strength) and options.refit_strength > 0):
        raise UsageError(f"--refit-strength {options.refit_strength}: a number above 0", hint="Between 0.1 and 1.")
    if not 1 <= options.refit_sweeps <= 100:
        raise UsageError(f"--refit-sweeps {options.refit_sweeps}: from 1 to 100")
    if options.distill < 0:
        raise UsageError(f"--distill {options.distill}: a number of steps from 0 up")
    for one, other in (("merge", "refit"), ("merge", "sequential")):
        if getattr(options, one) and getattr(options, other):
            raise UsageError(f"{flag_of(one)} and {flag_of(other)} exclude each other", hint="Pass one of them.")
    if options.refit_strength != PruneOptions().refit_strength and not options.refit:
        raise UsageError("--refit-strength goes with --refit", hint="Add --refit and --data FILE.")
    if options.refit_sweeps != PruneOptions().refit_sweeps and not options.refit:
        raise UsageError("--refit-sweeps goes with --refit", hint="Add --refit and --data FILE.")
    if options.sequential and (options.threshold is not None or gate is not None):
        raise UsageError("--sequential needs a number of experts that is known first", hint="Pass --ratio or --keep.")


def _check_top_k(model: Model, options: PruneOptions, left: int | None) -> None:
    if options.top_k is None:
        return
    limit = model.num_experts if left is None else left
    if not 1 <= options.top_k <= limit:
        raise UsageError(f"--top-k {options.top_k}: from 1 to the {limit} experts of a layer")
    for name in ("merge", "sequential", "protect_coverage"):
        if left == model.num_experts and getattr(options, name):
            raise UsageError(
                f"{flag_of(name)} says which experts stay, and --top-k alone removes none",
                hint="Leave it out, or pass --ratio or --keep too.",
            )
    if left == model.num_experts and options.top_k == model.top_k:
        raise UsageError(f"--top-k {options.top_k} is what the model has already", hint="Nothing would change.")
    routing = model.family.routing
    if routing is not None and routing.top_k is not None and options.top_k != routing.top_k:
        raise UsageError(f"{model.family.model_type} routes to exactly {routing.top_k} experts")


def orders_of(model: Model, evidence: Evidence, **parameters: Any) -> dict[int, Order] | None:
    """Every layer's order of removal, or None when the evidence has not been measured (a dry run)."""
    options = take(PruneOptions, parameters)
    name = options.criterion or default_criterion(model, evidence)
    evidence = replace(
        evidence, rule=rule_of(model), similarity=options.similarity, num_experts=model.num_experts,
        seed=take(PlanOptions, parameters).seed,
    )  # fmt: skip
    if not _measured(CRITERIA[name], evidence):
        return None
    protected = protected_experts(model, options, evidence)
    return {layer: CRITERIA[name].order(evidence, layer, protected[layer]) for layer in model.moe_layers}


def _measured(criterion: Criterion, evidence: Evidence) -> bool:
    """Whether everything that a criterion needs is there."""
    if criterion.needs_data:
        weights = criterion.name == "redundancy" and evidence.similarity in ("aligned", "raw")
        return evidence.statistics is not None and not (weights and evidence.weight_cosine is None)
    if criterion.needs == "weights":
        return getattr(evidence, criterion.name) is not None
    return True


def choose(
    model: Model, orders: Mapping[int, Order], left: int, *, evidence: Evidence, criterion: str,
    protected: Mapping[int, frozenset[int]], nested: bool = False,
) -> dict[int, list[int]]:  # fmt: skip
    """The experts that stay in every layer; of each group of the router equally many go. `nested` leaves out what makes
    the sets of two budgets differ by more than the experts between them."""
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
                f"layer {layer}: {len(gone)} experts may go, {model.num_experts - left} must",
                hint="Protect fewer experts, or remove fewer.",
            )
        keep[layer] = [e for e in range(model.num_experts) if e not in gone]
        if refine is not None:
            keep[layer] = refine(evidence, layer, protected[layer], keep[layer])
    return keep


def protected_experts(model: Model, options: PruneOptions, evidence: Evidence) -> dict[int, frozenset[int]]:
    """--protect and --protect-coverage together: of every data source, the experts with the largest sums of g |f| that
    make up the share. Without statistics only the first is known. Raises InputError for all-zero statistics."""
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
    """{layer: {kept expert: dropped ones that it absorbs}}, each going to the kept expert most similar to it: by
    outputs and router logits together as REAM does (the mean of the two), or by the --similarity asked for."""
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


def _left_by_threshold(
    model: Model, options: PruneOptions, evidence: Evidence, orders: Mapping[int, Order] | None
) -> int:
    """Experts left when in every layer only those with a stand-in go; the layer with the fewest decides for all."""
    if options.threshold is None or orders is None or evidence.statistics is None:
        flag = "threshold" if options.threshold is not None else "max_loss_increase"
        raise UsageError(
            f"{flag_of(flag)} lets measurements decide how many experts go",
            hint="Pass --stats STATS, or run without --dry-run and with --data FILE."
            if flag == "threshold"
            else "Run without --dry-run and with --data FILE; `moeconv prune MODEL --curve` shows all ratios.",
        )
    evidence = replace(evidence, similarity=options.similarity)
    counts = {layer: stand_ins(evidence, layer, order, options.threshold) for layer, order in orders.items()}
    removed = min(min(counts.values()), model.num_experts - (options.top_k or model.top_k))
    removed -= removed % model.groups[0]
    if removed == 0:
        at = min(counts, key=lambda layer: counts[layer])
        raise UsageError(
            f"--threshold {options.threshold}: no expert of layer {at} has a stand-in that similar",
            hint="Experts of a model trained apart are rarely alike: pass --ratio, or a lower --threshold.",
        )
    return model.num_experts - removed


def parse_protect(text: str | None, model: Model) -> dict[int, frozenset[int]]:
    """`0:3,5:1,*:0` -> {layer: protected experts}. Raises UsageError."""
    protected: dict[int, set[int]] = {layer: set() for layer in model.moe_layers}
    for word in text.split(",") if text else ():
        first, _, second = word.strip().partition(":")
        layer, expert = parse_index(first), parse_index(second)
        layers = model.moe_layers if first == "*" else (layer,) if layer in protected else ()
        if not layers or expert is None:
            raise UsageError(f"--protect {escape(word)!r}: not LAYER:EXPERT of this model", hint="Example: 0:3,*:0.")
        if expert >= model.num_experts:
            raise UsageError(f"--protect {escape(word)!r}: the model has experts 0 to {model.num_experts - 1}")
        for at in layers:
            protected[at].add(expert)
    return {layer: frozenset(chosen) for layer, chosen in protected.items()}


def _check_feasible(model: Model, left: int, protected: Mapping[int, frozenset[int]], top_k: int) -> None:
    if not 1 <= left < model.num_experts:
        raise UsageError(
            f"keeping {left} of {model.num_experts} experts removes nothing that could be removed",
            hint=f"Keep from {top_k} to {model.num_experts - 1}.",
        )
    if left < top_k:
        raise UsageError(
            f"{left} experts are fewer than the {top_k} that every token is routed to",
            hint=f"Keep at least {top_k}: with fewer the model loads and fails at its first token.",
        )
    groups, used = model.groups
    if left % groups:
        raise UsageError(
            f"{left} experts do not form {groups} groups of equal size, which this router chooses among",
            hint=f"Keep a multiple of {groups}.",
        )
    least = model.family.routing.best_of_group if groups > 1 and model.family.routing else 1
    if left // groups < least:
        raise UsageError(
            f"{left} experts leave {left // groups} in each of {groups} groups, which are ranked by their best {least}",
            hint=f"Keep at least {least * groups}.",
        )
    if used * (left // groups) < top_k:
        raise UsageError(
            f"a token may use {used} of {groups} groups: {used * (left // groups)} of {left} experts, fewer than the "
            f"{top_k} that it is routed to",
            hint=f"Keep at least {groups * -(-top_k // used)}.",
        )
    size = model.num_experts // groups
    for layer, chosen in protected.items():
        for group in range(groups):
            here = sum(group * size <= expert < (group + 1) * size for expert in chosen)
            if here > left // groups:
                where = f"layer {layer}" + (f", group {group}" if groups > 1 else "")
                raise UsageError(f"--protect names {here} experts of {where}, only {left // groups} stay")


def _checked_keep(model: Model, keep: Keep, left: int) -> dict[int, list[int]]:
    if set(keep) != set(model.moe_layers):
        raise UsageError("keep_experts must name every MoE layer", hint=f"Layers: {list(model.moe_layers)}.")
    for layer, kept in keep.items():
        if len(kept) != left or len(set(kept)) != left or not all(0 <= e < model.num_experts for e in kept):
            raise UsageError(f"keep_experts of layer {layer} must name {left} different experts")
        groups, size = model.groups[0], model.num_experts // model.groups[0]
        if any(sum(e // size == g for e in kept) != left // groups for g in range(groups)):
            raise UsageError(f"keep_experts of layer {layer} must name equally many of each of {groups} groups")
    return {layer: sorted(keep[layer]) for layer in model.moe_layers}


def _items(model: Model, keep: Keep, dtype: str | None) -> list[Item]:
    # Nothing measures multi-token-prediction layers, so they follow the last layer, whose output they read.
    keep = dict(keep) | dict.fromkeys(model.mtp_layers, keep[model.moe_layers[-1]])
    position = {layer: {e: i for i, e in enumerate(kept)} for layer, kept in keep.items()}

    def renewed(ref: TensorRef) -> list[Item] | None:
        role = model.roles[ref.name]
        if role.group not in ("expert", "router") or role.layer is None:
            return None
        axis = model.family.expert_axis(role.key)
        if axis is not None:
            return [_cut(model, ref, role.key, keep[role.layer], axis=axis, dtype=dtype, changed=role.group)]
        if role.expert is None or (new := position[role.layer].get(role.expert)) is None:
            return None if role.expert is None else []
        name = with_expert(ref.name, role.expert, new)
        return [carry(ref, role=role.key, name=name, dtype=dtype, params=model.numel(ref), changed="expert")]

    return carry_all(model, dtype=dtype, replace=renewed)


def _cut(
    model: Model, ref: TensorRef, key: str, kept: Sequence[int], *, axis: int, dtype: str | None, changed: str
) -> Item:
    """The kept experts' entries along `axis`: byte ranges joined, or cast when another dtype is asked for."""
    layout = model.family.packed.get(key)
    each = ref.shape[axis] // model.num_experts if layout and layout.flat else 1  # rows of one expert
    if any(size != 1 for size in ref.shape[:axis]) or ref.shape[axis] != model.num_experts * each:
        raise InputError(
            f"tensor {escape(ref.name)!r} has shape {list(ref.shape)}, not an entry for each of {model.num_experts} "
            "experts",
            hint="config.json and the shards do not belong together.",
        )
    flat = replace(ref, shape=(model.num_experts, each, *ref.shape[axis + 1 :]))  # the dimensions before it are 1
    shape = (*ref.shape[:axis], len(kept) * each, *ref.shape[axis + 1 :])
    casts = dtype is not None and ref.dtype in FLOAT_DTYPES and key not in model.family.float32
    out = dtype if casts and dtype else ref.dtype
    params = model.numel(ref) // model.num_experts * len(kept)
    kernel = "copy" if out == ref.dtype else "cast"
    return Item((TensorSpec(ref.name, out, shape, key, params),), kernel, pick_rows(flat, kept), {}, changed)


def scales_of(model: Model, keep: Keep, evidence: Evidence, options: PruneOptions) -> dict[int, float]:
    """{layer: what its kept experts' outputs are multiplied by} where a router does not renormalise: there the weights
    of the experts that stay grow, by the share of those that went. The least-squares scale on the token sample."""
    wanted = not model.renormalises if options.rescale is None else options.rescale
    if not wanted or options.refit or options.merge or evidence.statistics is None or model.quantization:
        return {}
    evidence = replace(evidence, rule=rule_of(model))
    try:
        return {layer: sample_of(evidence, layer).scale(kept) for layer, kept in keep.items()}
    except (InputError, KeyError):
        return {}  # statistics without a token sample: the warning says what to do


def _scaled(model: Model, items: list[Item], scales: Mapping[int, float]) -> list[Item]:
    """The items with every down projection of these layers scaled."""
    made = []
    for item in items:
        spec = item.outputs[0]
        role = model.roles.get(spec.name)
        down = role is not None and role.key in ("expert.down", "expert.down_bias")
        if role is None or not down or role.layer is None or role.layer not in scales:
            made.append(item)
            continue
        inputs = [["input", {"index": i}, []] for i in range(len(item.inputs))]
        tree = ["scale", {"by": scales[role.layer]}, [["concat", {}, inputs] if len(inputs) > 1 else inputs[0]]]
        made.append(Item(item.outputs, "compute", item.inputs, {"tree": tree}, item.changed))
    return made


def _replaced(items: list[Item], overlays: Mapping[str, SafetensorsFile]) -> list[Item]:
    """The items with the bytes of overlays for the tensors that these hold; the last overlay of a name counts."""
    made = []
    unused = {(origin, name) for origin, file in overlays.items() for name in file.tensors}
    for item in items:
        for origin, file in overlays.items():
            info = file.tensors.get(item.outputs[0].name) if len(item.outputs) == 1 else None
            if info is None:
                continue
            (spec,) = item.outputs
            if info.shape != spec.shape or info.dtype not in FLOAT_DTYPES:
                raise InputError(
                    f"{file.label}: {escape(spec.name)} has shape {list(info.shape)}, the result {list(spec.shape)}",
                    hint="It was made for another plan.",
                )
            ref = TensorRef(info.name, info.dtype, info.shape, "", info.start, info.nbytes)
            item = Item((spec,), "copy" if info.dtype == spec.dtype else "cast", (whole(ref, origin=origin),), {},
                        item.changed)  # fmt: skip
            unused.discard((origin, spec.name))
        made.append(item)
    if unused:
        origin, name = min(unused)
        raise InputError(f"overlay {origin} holds {escape(name)}, which the result has not", hint="Run it again.")
    return made


def _config(model: Model, left: int, dtype: str | None, top_k: int | None = None) -> dict[str, Any]:
    config = dict(model.checkpoint.config)
    nested = config.get(model.family.root) if model.family.root else None
    text = dict(nested) if isinstance(nested, dict) else config
    said = dict.fromkeys(model.family.num_experts, left)
    if top_k is not None:
        said |= dict.fromkeys(model.family.top_k, top_k)
    text.update(model.family.write(text, said))
    if isinstance(nested, dict):
        config[model.family.root] = text
    if dtype:
        config.pop("torch_dtype", None)
        config["dtype"] = TORCH_NAMES[dtype]
    return config


def _warnings(
    model: Model, criterion: str | None, options: PruneOptions, scales: Mapping[int, float], left: int
) -> list[str]:
    warnings = check_served(model.family.model_type, options.target)
    lost = [ranks for ranks in _RANKS if model.num_experts % ranks == 0 and left % ranks]
    if lost:
        warnings.append(
            f"{left} experts do not divide over {' or '.join(map(str, lost))} devices, as {model.num_experts} do: "
            "expert parallelism needs equal shares"
        )
    if model.mtp_layers:
        warnings.append(
            f"multi-token-prediction layers {list(model.mtp_layers)} keep the experts with the numbers that layer "
            f"{model.moe_layers[-1]} keeps: no data runs through them, so drafted tokens may be accepted less often"
        )
    if criterion == "aimer":
        warnings.append("aimer looks at weights only: unreliable on small or imbalanced models; calibrate if you can")
    plain = not model.renormalises and model.family.routing and model.family.routing.score == "softmax"
    if plain and criterion and not (options.refit or options.distill or scales):
        warnings.append(
            "this router does not renormalise: the surviving experts' weights grow; --refit folds the scale back, and "
            "so does --distill"
        )
    return warnings
