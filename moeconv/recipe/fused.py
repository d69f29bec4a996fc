"""A prune and the quantize that follows it, in one pass: only the quantized model is written."""

from __future__ import annotations

import os
from pathlib import Path

from moeconv.checkpoint.staging import Measured
from moeconv.families.model import Model, open_model
from moeconv.options import WriteOptions
from moeconv.plan.execute import execute
from moeconv.plan.fuse import fuse
from moeconv.plan.meter import Meter
from moeconv.plan.plan import Plan
from moeconv.plan.planned import planned_model
from moeconv.prune.step import prune
from moeconv.quantize.formats import FORMATS
from moeconv.quantize.spec import BY_DATA, MIXED
from moeconv.quantize.step import plan_packing
from moeconv.recipe.guard import read_by
from moeconv.recipe.read import Recipe
from moeconv.requests import PruneRequest, QuantizeRequest
from moeconv.runner.run import run_plan
from moeconv.types import JsonObject

_PRUNED = "pruned"


def prune_and_quantize(request: PruneRequest, then: QuantizeRequest, *, meter: Meter) -> JsonObject:
    """Prune by `request` and quantize by `then` in one pass. Both requests have the same OUT.

    Returns the JSON of quantize, with the block of prune beside its own. Call it only if `can_fuse` is true. If the
    quantization reads only parts of a tensor that the prune computes, the two plans cannot be joined: the pruned model
    is then written beside OUT, and removed at the end.
    """
    from moeconv.quantize.proof import prove_packing

    def run(
        plan: Plan, model: Model, out: str, write: WriteOptions, *, measured: Measured, **_: object
    ) -> JsonObject:  # fmt: skip
        fused = fuse(plan, plan_packing(planned_model(plan), then).plan)
        if fused is None:  # for example, where one tensor holds all experts of a layer and its dtype changes
            result = _after(plan, model, then, measured=measured, meter=meter)
        else:
            result = run_plan(
                fused, model, out, write, check=lambda staged: prove_packing(fused, model, staged), meter=meter,
                measured=measured,
            )  # fmt: skip
        between = {"bytes": planned_model(plan).checkpoint.nbytes, "total": plan.params_total}
        return result | {"prune": dict(plan.block), "between": between | {"active": plan.params_active}}

    return prune(request, meter=meter, run=run)


def _after(
    first: Plan, model: Model, request: QuantizeRequest, *, measured: Measured, meter: Meter
) -> JsonObject:  # fmt: skip
    """Write the model of plan `first` beside OUT, and quantize it from there."""
    from moeconv.quantize.proof import prove_packing

    def write(folder: Path) -> None:
        meter.note(f"writing the pruned model beside OUT ({first.nbytes} bytes)")
        execute(first, source=model.checkpoint, out=folder / _PRUNED, jobs=request.write.jobs, overwrite=True)

    pruned = open_model(measured.once("pruned", write, resumes=True)[0] / _PRUNED)
    plan = plan_packing(pruned, request).plan
    return run_plan(
        plan, pruned, request.out, request.write, check=lambda staged: prove_packing(plan, pruned, staged),
        measured=measured, meter=meter,
    )  # fmt: skip


def can_fuse(request: PruneRequest, then: QuantizeRequest) -> bool:
    """Whether a prune and a quantize can be one pass: nothing has to be measured or written between them."""
    first, second = request.prune, then.quantize
    repairs = first.refit or first.heal or first.sequential or first.merge or first.distill or first.curve
    decided = second.method not in BY_DATA and second.scheme != MIXED and FORMATS[second.format].shard is None
    return decided and not repairs and not any(w.part or w.dry_run for w in (request.write, then.write))


def fuses(recipe: Recipe, at: int) -> bool:
    """Whether the step with index `at` is a prune that one pass can do together with the quantize after it: nothing is
    measured on the pruned model, no other step reads it, and it does not exist already."""
    step, then = recipe.steps[at], recipe.steps[at + 1] if at + 1 < len(recipe.steps) else None
    if then is None or (step.command, then.command) != ("prune", "quantize") or then.source != step.to:
        return False
    readers = [path for s in recipe.steps for _, path in read_by(s)].count(str(step.to))
    if readers != 1 or recipe.evaluate is not None or os.path.lexists(str(step.to)):
        return False
    first, second = step.asked, then.asked
    assert isinstance(first, PruneRequest) and isinstance(second, QuantizeRequest)
    return can_fuse(first, second)
