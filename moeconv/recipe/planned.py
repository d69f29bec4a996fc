"""The plan of one step of a recipe, without measuring anything."""

from __future__ import annotations

from dataclasses import replace

from moeconv.families.model import Model
from moeconv.plan.plan import Plan
from moeconv.prune.choice import resolve_criterion
from moeconv.prune.criteria import Evidence
from moeconv.prune.decision import decide
from moeconv.prune.limits import check_prune
from moeconv.prune.planner import prune_plan
from moeconv.quantize.step import plan_packing
from moeconv.recipe.read import Asked
from moeconv.requests import PruneRequest, QuantizeRequest, UpcycleRequest
from moeconv.upcycle.planner import upcycle_plan


def plan_of(model: Model, asked: Asked) -> Plan | None:
    """The plan of a request on a model that may be planned itself; None for tune, which keeps every size."""
    if isinstance(asked, UpcycleRequest):
        return upcycle_plan(model, asked.upcycle, asked.plan)
    if isinstance(asked, PruneRequest):
        has_data = bool(asked.prune.stats or asked.data.data)
        criterion = resolve_criterion(asked.prune.criterion, has_data=has_data, model=model)
        options, common = replace(asked.prune, criterion=criterion), asked.plan
        left = check_prune(model, options, common)
        decision = decide(model, options, Evidence(), left=left, seed=common.seed)
        return prune_plan(model, options, common, decision, evidence=Evidence())
    if isinstance(asked, QuantizeRequest):
        return plan_packing(model, asked).plan
    return None
