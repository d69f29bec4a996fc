"""plan_prune: makes a Plan from a model, a budget and the evidence of a criterion. Needs no torch and no tensor bytes.

Without evidence, the plan keeps the first experts as a placeholder: its sizes are exact, and its `keep` is null.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moeconv.checkpoint.overlay import Overlay
from moeconv.families.head import head_warnings, with_head
from moeconv.families.model import Model
from moeconv.families.neurons import Narrow
from moeconv.families.packed import SHARED, with_quantization
from moeconv.families.served import check_served
from moeconv.families.written import written_config
from moeconv.options import PlanOptions, PruneOptions, check_names, from_keywords, parameters_of
from moeconv.plan.arrange import arrange
from moeconv.plan.build import TORCH_NAMES, count_planned, parse_dtype
from moeconv.plan.overlay import fingerprint
from moeconv.plan.plan import Plan
from moeconv.prune.criteria import CRITERIA, Evidence
from moeconv.prune.cutting import Keep, pruned_items, replaced, scaled, scales_of, with_mtp
from moeconv.prune.decision import Decision, decide
from moeconv.prune.limits import check_prune
from moeconv.prune.named_modules import renumbered
from moeconv.prune.width import ORIGIN, Width
from moeconv.types import JsonObject
from moeconv.units import counted

_RANKS = (2, 4, 8)  # devices that experts are commonly spread over


def plan_prune(
    model: Model,
    *,
    evidence: Evidence | None = None,
    keep_experts: Keep | None = None,
    overlays: Mapping[str, Overlay] | None = None,
    groups: Mapping[int, Mapping[int, Sequence[int]]] | None = None,
    **parameters: Any,
) -> Plan:
    """Plan the removal of experts; parameters are the fields of PruneOptions and PlanOptions.

    `keep_experts` {layer: kept ids} overrides criterion and budget. `overlays` {origin: file} hold tensors named as in
    the result that take the place of the sliced ones (refitted, merged, tuned); run the plan with them as `origins`.
    The one named `neurons` has the neurons that stay.
    `groups` {layer: {kept: absorbed}} go into the block. Raises UsageError for a budget that cannot be met or that
    nothing given decides, InputError for statistics that cannot rank experts.
    """
    check_names(parameters, PruneOptions, PlanOptions)
    options, common = from_keywords(PruneOptions, parameters), from_keywords(PlanOptions, parameters)
    left, evidence = check_prune(model, options, common), evidence or Evidence()
    decision = replace(decide(model, options, common, evidence, left=left, keep=keep_experts), groups=groups)
    return prune_plan(model, options, common, decision, evidence=evidence, overlays=overlays)


def prune_plan(
    model: Model, options: PruneOptions, common: PlanOptions, decision: Decision, *, evidence: Evidence,
    overlays: Mapping[str, Overlay] | None = None,
) -> Plan:  # fmt: skip
    """The plan of a decision. `evidence` is what the decision was made on."""
    keep, left, orders = decision.all_kept, decision.left, decision.orders
    prunes = left < model.num_experts
    scales = scales_of(model, keep, evidence, options) if prunes and not _has_experts(model, overlays) else {}
    width = decision.width
    narrow = None if width is None else width.narrow(model)
    items = scaled(model, pruned_items(model, keep, parse_dtype(common.dtype), narrow=narrow), scales)
    items = replaced(items, {origin: file for origin, file in (overlays or {}).items() if origin != ORIGIN})
    top_k = options.top_k or model.top_k
    total, active = count_planned(items, model.family, layers=model.num_layers, top_k=top_k, num_experts=left)
    block: JsonObject = {
        "criterion": decision.criterion if prunes else None,
        "experts_before": model.num_experts,
        "experts_after": left,
        "keep": {str(layer): list(kept) for layer, kept in keep.items()} if decision.known else None,
        "scores": {str(layer): list(o.scores) for layer, o in orders.items()} if orders else None,
    }
    if width is not None and narrow is not None:
        block |= _widths(width, narrow)
    measured_on = getattr(evidence.statistics, "metadata", {}).get("identity", model.identity)
    if measured_on != model.identity:
        block["stats_of_twin"] = measured_on
    if options.top_k is not None:
        block |= {"top_k_before": model.top_k, "top_k_after": options.top_k}
    if scales:
        block["scale"] = {str(layer): scale for layer, scale in scales.items()}
    if decision.groups is not None:
        block["groups"] = {
            str(at): {str(e): list(into) for e, into in of_layer.items()} for at, of_layer in decision.groups.items()
        }
    prints = {"overlays": {origin: fingerprint(file) for origin, file in overlays.items()}} if overlays else {}
    return Plan(
        command="prune",
        parameters=parameters_of(options, common) | _decided_by(evidence, options, block) | prints,
        identity=model.identity,
        config=pruned_config(model, keep, parse_dtype(common.dtype), options.top_k, narrow),
        shards=arrange(items, common, model.family),
        params_total=total,
        params_active=active,
        block=block,
        warnings=(
            *model.warnings,
            *head_warnings(model),
            *_warnings(model, decision, options, scales),
        ),
        dropped=model.dropped,
        promise=pruned_promise(model, keep, narrow),
    )


def _widths(width: Width, narrow: Narrow) -> JsonObject:
    """The entries about the neurons that the experts, and the shared expert, keep."""
    found: JsonObject = {}
    if width.after != width.before:
        found |= {"width_before": width.before, "width_after": width.after, "multiple": width.multiple}
    down = next(filter(None, map(narrow.shared_down, narrow.model.moe_layers)), None)
    if down is not None:
        found |= {"shared_width_before": down[1].size, "shared_width_after": down[1].new}
    return found


def _decided_by(evidence: Evidence, options: PruneOptions, block: JsonObject) -> JsonObject:
    """The entries of the manifest that identify what the decision was made on: the statistics, their data and the kept
    experts, by their hashes, because a path has no meaning on another machine."""
    keep, metadata = block["keep"], getattr(evidence.statistics, "metadata", None)
    found: JsonObject = {"criterion": block["criterion"]}
    if keep is not None and block["criterion"] is not None:
        found["keep_sha256"] = hashlib.sha256(json.dumps(keep, sort_keys=True).encode()).hexdigest()
    if metadata is not None:
        found["data_sha256"] = [s.get("sha256") for s in metadata["sources"] if isinstance(s, Mapping)]
        found |= {name: metadata[name] for name in ("tokens", "seq_len") if name in metadata}
    if "stats_of_twin" in block:
        found["stats_of_twin"] = block["stats_of_twin"]
    stats = (
        None
        if options.stats is None or metadata is None
        else hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode()).hexdigest()
    )
    return {"stats": stats, "decided_by": found}


def pruned_promise(model: Model, keep: Keep, narrow: Narrow | None = None) -> dict[str, int]:
    """{role: number of tensors that change}: those of the kept experts, all that have an entry per expert, and those of
    shared experts and FFNs that change their width with the experts."""
    counts = {"expert": 0, "router": 0} if model.num_experts else {}
    stays = {layer: frozenset(kept) for layer, kept in with_mtp(model, keep).items()}
    for role in model.roles.values():
        if role.group in ("expert", "router") and (role.expert is not None or role.part not in SHARED):
            counts[role.group] += role.expert is None or role.layer is None or role.expert in stays[role.layer]
        elif narrow is not None and narrow.cut(role) is not None:
            counts[role.group] = counts.get(role.group, 0) + 1
    return counts


def _has_experts(model: Model, overlays: Mapping[str, Overlay] | None) -> bool:
    """Whether overlays have weights of experts, and not of routers alone."""
    names = (name for file in (overlays or {}).values() for name in file.tensors)
    return any(name in model.roles and model.roles[name].group == "expert" for name in names)


def pruned_config(
    model: Model, keep: Keep, dtype: str | None, top_k: int | None = None, narrow: Narrow | None = None
) -> JsonObject:
    """config.json of the pruned model."""
    config = with_quantization(with_head(model), lambda stated: renumbered(model, stated, with_mtp(model, keep)))
    changes: JsonObject = {}
    if keep:
        changes |= dict.fromkeys(model.family.experts.count, len(next(iter(keep.values()))))
    if top_k is not None:
        changes |= dict.fromkeys(model.family.experts.top_k, top_k)
    changes |= narrow.changes if narrow is not None else {}
    return written_config(config, model.family, changes=changes, dtype=TORCH_NAMES[dtype] if dtype else None)


def _warnings(model: Model, decision: Decision, options: PruneOptions, scales: Mapping[int, float]) -> list[str]:
    left = decision.left
    criterion = decision.criterion if left < model.num_experts else ""
    warnings = check_served(model.family.model_type, options.target)
    warnings += [] if decision.width is None else decision.width.remarks
    lost = [ranks for ranks in _RANKS if model.num_experts % ranks == 0 and left % ranks]
    if lost:
        warnings.append(
            f"{counted(left, 'expert')} cannot be divided equally among {' or '.join(map(str, lost))} devices, as "
            f"{model.num_experts} can: expert parallelism needs equal shares"
        )
    blind = [layer for layer in model.mtp_layers if layer not in decision.predicted]
    if blind:
        runs = all(model.place_of_prediction(layer) is not None for layer in blind)
        other = model.family.prediction.otherwise or "their block is not one of the model's layers"
        why = "no data ran through them" if runs else other
        warnings.append(
            f"multi-token-prediction layers {blind} keep the experts with the same numbers as layer "
            f"{model.moe_layers[-1]}, because {why}: drafted tokens may be accepted less often"
        )
    if criterion and CRITERIA[criterion].warning:
        warnings.append(CRITERIA[criterion].warning)
    plain = not model.renormalises and model.family.experts.routing and model.family.experts.routing.score == "softmax"
    if plain and criterion and not (options.refit or options.distill or scales):
        warnings.append(
            "this router does not renormalise, so the weights of the kept experts grow; --refit and --distill correct "
            "their scale"
        )
    return warnings
