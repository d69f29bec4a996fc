"""The step `tune`: it trains into an overlay, and applies the overlay with a plan."""

from __future__ import annotations

from pathlib import Path

from moeconv.checkpoint.hub import resolve
from moeconv.checkpoint.overlay import Overlay
from moeconv.families.model import Model
from moeconv.options import parameters_of
from moeconv.plan.meter import Meter
from moeconv.plan.overlay import ORIGIN
from moeconv.requests import TuneRequest
from moeconv.runner.run import check_out, measuring, open_resolved, planned_json, planned_memory, run_plan
from moeconv.tune.need import need_of_tune
from moeconv.types import JsonObject
from moeconv.world import announce, current, follow

_OVERLAY = "overlay"


def tune(request: TuneRequest, *, meter: Meter) -> JsonObject:
    """Train the router (and what --train names) into an overlay, then apply the overlay."""
    from moeconv.tune.planner import overlay_plan

    out, write = request.out, request.write
    model = open_resolved(request.model)
    check_out(out, model, write)
    if write.dry_run:
        return _dry_run(model, request)
    from moeconv.tune.run import tune as train

    asked = parameters_of(request.tune, request.data, request.measure)
    if request.tune.teacher:
        asked["teacher"] = resolve(request.tune.teacher)

    def measure(folder: Path) -> JsonObject:
        return train(str(model.checkpoint.path), folder / _OVERLAY, seed=request.plan.seed, meter=meter, **asked)

    def together(folder: Path) -> JsonObject:
        announce(_OVERLAY, folder)
        return measure(folder)

    if not current().leads:  # this process takes part if the first process finds that there is work
        follow({_OVERLAY: measure})
        return {"command": "tune", "output": out, "tune": {}}
    decides = (request.tune, request.plan, request.data, request.measure)
    with measuring("tune", model, out, write, *decides, meter=meter) as measured:
        folder, block = measured.once("overlay", together)
        announce(None)
        overlay = Overlay(folder / _OVERLAY)
        plan = overlay_plan(model, overlay, request.plan)
        result = run_plan(
            plan, model, out, write, meter=meter, origins={ORIGIN: overlay}, figures=block, measured=measured
        )
    result["warnings"] += block.pop("warnings", [])
    result["tune"] |= block
    return result


def _dry_run(model: Model, request: TuneRequest) -> JsonObject:
    """The sizes of the output, which are those of the model, and the memory that training will take. Training decides
    the contents, so that the plan has no identifier yet."""
    from moeconv.tune.planner import plan_unmade

    options = request.tune
    teacher = open_resolved(options.teacher) if options.teacher else None
    plan = plan_unmade(model, options, request.plan)
    need, run = need_of_tune(model, teacher, options, request.measure)
    planned = planned_memory(need, run, request.measure)
    result = planned_json(plan, request.out, dry_run=True) | {"plan_id": None, "memory": planned["memory"]}
    result["warnings"] += planned["warnings"]
    return result
