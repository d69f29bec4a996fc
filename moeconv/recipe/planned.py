"""The plan of one step of a recipe, without measuring anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeconv.families.model import Model
from moeconv.options import PlanOptions, PruneOptions, UpcycleOptions
from moeconv.plan.plan import Plan
from moeconv.quantize.step import plan_packing
from moeconv.runner.run import named


def plan_step(command: str, model: Model, values: Mapping[str, Any]) -> Plan | None:
    """The plan of a step without measuring anything; None for tune, which keeps every size."""
    if command == "upcycle":
        from moeconv.upcycle.planner import plan_upcycle

        return plan_upcycle(model, **named(values, UpcycleOptions, PlanOptions))
    if command == "prune":
        from moeconv.prune.choice import resolve_criterion
        from moeconv.prune.planner import plan_prune

        parameters = named(values, PruneOptions, PlanOptions)
        has_data = bool(values.get("stats") or values.get("data"))
        parameters["criterion"] = resolve_criterion(parameters["criterion"], has_data=has_data, model=model)
        return plan_prune(model, **parameters)
    if command == "quantize":
        return plan_packing(model, values).plan
    return None
