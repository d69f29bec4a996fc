"""The step tune: what is trained into an overlay, and the plan that applies it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeconv.checkpoint.hub import resolve
from moeconv.checkpoint.overlay import Overlay
from moeconv.errors import UsageError
from moeconv.plan.meter import Meter
from moeconv.plan.overlay import ORIGIN
from moeconv.requests import TuneRequest, keywords
from moeconv.runner.run import check_out, measuring, open_resolved, run_plan
from moeconv.world import current, first

_OVERLAY = "overlay"


def tune(request: TuneRequest, *, meter: Meter) -> dict[str, Any]:
    """Train the router (and what --train names) into an overlay, then apply the overlay."""
    from moeconv.tune.planner import overlay_plan

    out, write = request.out, request.write
    if write.dry_run:
        raise UsageError(
            "--dry-run never measures, and what tune writes is decided by training",
            hint="The result has the size of its input: see `moeconv inspect`.",
        )
    model = open_resolved(request.model)
    check_out(out, model, write)
    from moeconv.tune.run import tune as train

    asked = keywords(request.tune, request.data, request.measure)
    if request.tune.teacher:
        asked["teacher"] = resolve(request.tune.teacher)
    begun = False

    def measure(folder: Path) -> dict[str, Any]:
        return train(str(model.checkpoint.path), folder / _OVERLAY, seed=request.plan.seed, meter=meter, **asked)

    def together(folder: Path) -> dict[str, Any]:
        nonlocal begun
        begun = first(lambda: True)
        return measure(folder)

    if not current().leads:  # it has part in the work, when the first process finds that there is any
        return {"command": "tune", "output": out, "tune": measure(Path(out)) if first(lambda: True) else {}}
    decides = (request.tune, request.plan, request.data, request.measure)
    with measuring("tune", model, out, write, *decides, meter=meter) as measured:
        folder, block = measured.once("overlay", together)
        if not begun:
            first(lambda: False)
        overlay = Overlay(folder / _OVERLAY)
        plan = overlay_plan(model, overlay, request.plan)
        result = run_plan(
            plan, model, out, write, meter=meter, origins={ORIGIN: overlay}, figures=block, measured=measured
        )
    result["warnings"] += block.pop("warnings", [])
    result["seconds"] = round(result["seconds"] + block["seconds"], 3)  # training, then writing
    result["tune"] |= block
    return result
