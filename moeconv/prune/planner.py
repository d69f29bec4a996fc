"""plan_prune: an MoE, a budget and a criterion's evidence in, a Plan out. No torch, no tensor bytes.

Without evidence the plan keeps the first experts as a placeholder: its sizes are exact, its `keep` is null.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moeconv.checkpoint.reader import TensorRef
from moeconv.errors import InputError, UsageError, escape
from moeconv.families.model import Model
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
    model.check_separate_experts(router_rows=True)
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
        promise={
            "router": len(model.moe_layers),
            "expert": len(model.moe_layers) * left * sum("{E}" in t for t in model.family.tensors.values()),
        },
    )


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
    for layer, chosen in protected.items():
        if len(chosen) > left:
            raise UsageError(f"--protect names {len(chosen)} experts of layer {layer}, only {left} stay")


def _orders(
    model: Model, name: str, evidence: Evidence, protected: Mapping[int, frozenset[int]]
) -> dict[int, Order] | None:
    """Every layer's order of removal, or None when the evidence has not been measured (a dry run)."""
    chosen = CRITERIA[name]
    if (evidence.statistics if chosen.needs == "statistics" else evidence.aimer) is None:
        return None
    return {layer: chosen.order(evidence, layer, protected[layer]) for layer in model.moe_layers}


def _choose(model: Model, orders: Mapping[int, Order], left: int) -> dict[int, list[int]]:
    keep = {}
    for layer, order in orders.items():
        gone = set(order.experts[: model.num_experts - left])
        keep[layer] = [e for e in range(model.num_experts) if e not in gone]
    return keep


def _checked_keep(model: Model, keep: Keep, left: int) -> dict[int, list[int]]:
    if set(keep) != set(model.moe_layers):
        raise UsageError("keep_experts must name every MoE layer", hint=f"Layers: {list(model.moe_layers)}.")
    for layer, kept in keep.items():
        if len(kept) != left or len(set(kept)) != left or not all(0 <= e < model.num_experts for e in kept):
            raise UsageError(f"keep_experts of layer {layer} must name {left} different experts")
    return {layer: sorted(keep[layer]) for layer in model.moe_layers}


def _items(model: Model, keep: Keep, dtype: str | None) -> list[Item]:
    position = {layer: {e: i for i, e in enumerate(kept)} for layer, kept in keep.items()}

    def replace(ref: TensorRef) -> list[Item] | None:
        role = model.roles[ref.name]
        if role.group == "expert" and role.expert is not None and role.layer is not None:
            new = position[role.layer].get(role.expert)
            if new is None:
                return []
            name = model.family.name(role.key, layer=role.layer, expert=new)
            return [carry(ref, role=role.key, name=name, dtype=dtype, changed="expert")]
        if role.group == "router" and role.layer is not None:
            return [_cut_rows(ref, role.key, keep[role.layer], dtype)]
        return None

    return carry_all(model, dtype=dtype, replace=replace)


def _cut_rows(ref: TensorRef, key: str, kept: Sequence[int], dtype: str | None) -> Item:
    """The kept experts' rows of a router: byte ranges joined, or cast when another dtype is asked for."""
    shape = (len(kept), *ref.shape[1:])
    out = dtype if dtype and ref.dtype in TORCH_NAMES else ref.dtype
    count = len(kept) * (ref.shape[1] if len(ref.shape) > 1 else 1)
    kernel = "copy" if out == ref.dtype else "cast"
    return Item((TensorSpec(ref.name, out, shape, key, count),), kernel, pick_rows(ref, kept), {}, "router")


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
