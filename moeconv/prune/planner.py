"""plan_prune: an MoE, a budget and a criterion's evidence in, a Plan out. No torch, no tensor bytes.

Without evidence the plan keeps the first experts as a placeholder: its sizes are exact, its `keep` is null.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moeconv.checkpoint.header import FLOAT_DTYPES
from moeconv.checkpoint.reader import TensorRef
from moeconv.errors import InputError, UsageError, escape
from moeconv.families.model import Model
from moeconv.families.spec import with_expert
from moeconv.options import (
    PlanOptions,
    PruneOptions,
    check_names,
    did_you_mean,
    parameters_of,
    parse_index,
    parse_size,
    take,
)  # fmt: skip
from moeconv.plan.arrange import arrange
from moeconv.plan.build import TORCH_NAMES, carry, carry_all, count_planned, parse_dtype, pick_rows
from moeconv.plan.plan import Item, Plan, TensorSpec
from moeconv.prune.criteria import CRITERIA, Evidence, Order

Keep = Mapping[int, Sequence[int]]


def resolve_criterion(name: str | None, *, has_data: bool) -> str:
    """The criterion of a run. Raises UsageError when it needs statistics that are not given."""
    chosen = name or ("saliency" if has_data else "aimer")
    if chosen not in CRITERIA:
        raise UsageError(f"unknown --criterion {escape(chosen)}", hint=did_you_mean(chosen, CRITERIA))
    if CRITERIA[chosen].needs == "statistics" and not has_data:
        raise UsageError(
            f"--criterion {chosen} needs statistics",
            hint="Pass --data FILE, or --stats STATS from `moeconv calibrate MODEL STATS --data FILE`.",
        )
    return chosen


def plan_prune(
    model: Model, *, evidence: Evidence | None = None, keep_experts: Keep | None = None, **parameters: Any
) -> Plan:
    """Plan the removal of experts; parameters are the fields of PruneOptions and PlanOptions.

    `keep_experts` {layer: kept ids} overrides the criterion. Raises UsageError for a budget that cannot be met,
    InputError for evidence that says nothing.
    """
    check_names(parameters, PruneOptions, PlanOptions)
    options, common = take(PruneOptions, parameters), take(PlanOptions, parameters)
    if model.family.kind != "moe":
        raise InputError(f"{model.family.model_type} has no experts to prune", hint="Give a Mixture-of-Experts.")
    if model.quantization:
        raise InputError("the source is quantized", hint="Prune first, then quantize.")
    if not model.moe_layers:
        raise InputError("config.json makes no layer a Mixture-of-Experts", hint="There is nothing to prune.")
    protected = parse_protect(options.protect, model)
    left = budget(model, options, common)
    _check_feasible(model, left, protected)
    evidence = evidence or Evidence()
    name = options.criterion or ("aimer" if evidence.statistics is None else "saliency")
    orders = _orders(model, name, evidence, protected) if keep_experts is None else None
    keep: Keep
    if keep_experts is not None:
        keep = _checked_keep(model, keep_experts, left)
    elif orders is not None:
        keep = _choose(model, orders, left)
    else:
        keep = {layer: list(range(left)) for layer in model.moe_layers}
    known = keep_experts is not None or orders is not None
    items = _items(model, keep, parse_dtype(common.dtype))
    total, active = count_planned(items, top_k=model.top_k, num_experts=left)
    return Plan(
        command="prune",
        parameters=parameters_of(options, common),
        identity=model.identity,
        config=_config(model, left, parse_dtype(common.dtype)),
        shards=arrange(items, common, model.family),
        params_total=total,
        params_active=active,
        block={
            "criterion": name,
            "experts_before": model.num_experts,
            "experts_after": left,
            "keep": {str(layer): list(kept) for layer, kept in keep.items()} if known else None,
            "scores": {str(layer): list(o.scores) for layer, o in orders.items()} if orders else None,
        },
        warnings=(*model.checkpoint.warnings, *_warnings(model, name)),
        dropped=model.dropped,
        promise=_promise(model, left),
    )


def _promise(model: Model, left: int) -> dict[str, int]:
    """Tensors that change by role: those of the kept experts, and every one that has an entry for each expert."""
    counts = {"expert": 0, "router": 0}
    for role in model.roles.values():
        if role.group in counts:
            counts[role.group] += role.expert is None or role.expert < left
    return counts


def budget(model: Model, options: PruneOptions, common: PlanOptions) -> int:
    """Experts left in every layer, from exactly one of --keep, --ratio and --max-bytes. Raises UsageError."""
    given = [f for f in ("keep", "ratio", "max_bytes") if getattr(options, f) is not None]
    if len(given) != 1:
        raise UsageError(
            "give exactly one of --keep, --ratio and --max-bytes" + (f", not {len(given)}" if given else ""),
            hint="For half of the experts: --ratio 0.5.",
        )
    experts = model.num_experts
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


def _check_feasible(model: Model, left: int, protected: Mapping[int, frozenset[int]]) -> None:
    if not 1 <= left < model.num_experts:
        raise UsageError(
            f"keeping {left} of {model.num_experts} experts removes nothing that could be removed",
            hint=f"Keep from {model.top_k} to {model.num_experts - 1}.",
        )
    if left < model.top_k:
        raise UsageError(
            f"{left} experts are fewer than the {model.top_k} that every token is routed to",
            hint=f"Keep at least {model.top_k}: with fewer the model loads and fails at its first token.",
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
    if used * (left // groups) < model.top_k:
        raise UsageError(
            f"a token may use {used} of {groups} groups: {used * (left // groups)} of {left} experts, fewer than the "
            f"{model.top_k} that it is routed to",
            hint=f"Keep at least {groups * -(-model.top_k // used)}.",
        )
    size = model.num_experts // groups
    for layer, chosen in protected.items():
        for group in range(groups):
            here = sum(group * size <= expert < (group + 1) * size for expert in chosen)
            if here > left // groups:
                where = f"layer {layer}" + (f", group {group}" if groups > 1 else "")
                raise UsageError(f"--protect names {here} experts of {where}, only {left // groups} stay")


def _orders(
    model: Model, name: str, evidence: Evidence, protected: Mapping[int, frozenset[int]]
) -> dict[int, Order] | None:
    """Every layer's order of removal, or None when the evidence has not been measured (a dry run)."""
    chosen = CRITERIA[name]
    if (evidence.statistics if chosen.needs == "statistics" else evidence.aimer) is None:
        return None
    return {layer: chosen.order(evidence, layer, protected[layer]) for layer in model.moe_layers}


def _choose(model: Model, orders: Mapping[int, Order], left: int) -> dict[int, list[int]]:
    """The kept experts of every layer: of each group of the router equally many go, in the criterion's order."""
    groups, _ = model.groups
    size, away = model.num_experts // groups, (model.num_experts - left) // groups
    keep = {}
    for layer, order in orders.items():
        gone: set[int] = set()
        for group in range(groups):
            gone |= set([e for e in order.experts if e // size == group][:away])
        keep[layer] = [e for e in range(model.num_experts) if e not in gone]
    return keep


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
    if any(size != 1 for size in ref.shape[:axis]) or ref.shape[axis] != model.num_experts:
        raise InputError(
            f"tensor {escape(ref.name)!r} has shape {list(ref.shape)}, not an entry for each of {model.num_experts} "
            "experts",
            hint="config.json and the shards do not belong together.",
        )
    flat = replace(ref, shape=ref.shape[axis:])  # the dimensions before it are 1
    shape = (*ref.shape[:axis], len(kept), *flat.shape[1:])
    casts = dtype is not None and ref.dtype in FLOAT_DTYPES and key not in model.family.float32
    out = dtype if casts and dtype else ref.dtype
    params = model.numel(ref) // model.num_experts * len(kept)
    kernel = "copy" if out == ref.dtype else "cast"
    return Item((TensorSpec(ref.name, out, shape, key, params),), kernel, pick_rows(flat, kept), {}, changed)


def _config(model: Model, left: int, dtype: str | None) -> dict[str, Any]:
    config = dict(model.checkpoint.config)
    text = dict(config[model.family.root]) if model.family.root in config else config
    text |= dict.fromkeys(model.family.num_experts, left)
    if model.family.root in config:
        config[model.family.root] = text
    if dtype:
        config.pop("torch_dtype", None)
        config["dtype"] = TORCH_NAMES[dtype]
    return config


def _warnings(model: Model, criterion: str) -> list[str]:
    warnings = []
    if criterion == "aimer":
        warnings.append("aimer looks at weights only: unreliable on small or imbalanced models; calibrate if you can")
    if not model.renormalises and model.family.routing and model.family.routing.score == "softmax":
        warnings.append(
            "this router does not renormalise: the surviving experts' weights grow; a brief `moeconv tune "
            "--objective distill --teacher` against the unpruned model repairs it"
        )
    return warnings
