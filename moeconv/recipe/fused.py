"""A prune and the quantize behind it in one pass: only the quantized model is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeconv.checkpoint.staging import Measured
from moeconv.families.model import Model, open_model
from moeconv.options import WriteOptions
from moeconv.plan.execute import default_jobs, execute
from moeconv.plan.fuse import fuse
from moeconv.plan.meter import Meter
from moeconv.plan.plan import Plan
from moeconv.plan.planned import planned_model
from moeconv.prune.step import prune
from moeconv.quantize.formats import FORMATS
from moeconv.quantize.spec import MIXED
from moeconv.quantize.step import plan_packing
from moeconv.requests import PruneRequest, QuantizeRequest
from moeconv.runner.run import run_plan

_PRUNED = "pruned"


def prune_and_quantize(request: PruneRequest, then: QuantizeRequest, *, meter: Meter) -> dict[str, Any]:
    """Prune by `request` and quantize by `then` in one pass: only the quantized model is written, to the OUT of both.

    The JSON is quantize's, with prune's block beside it. Only where `can_fuse` says so. Where the one reads parts of
    what the other computes, the pruned model lies beside OUT for a while.
    """
    from moeconv.quantize.proof import prove_packing

    def run(plan: Plan, model: Model, out: str, write: WriteOptions, *, measured: Measured, **_: Any) -> dict[str, Any]:
        fused = fuse(plan, plan_packing(planned_model(plan), then).plan)
        if fused is None:  # a part of what is computed, as of cast experts that lie in one tensor
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
) -> dict[str, Any]:  # fmt: skip
    """Write what `first` plans beside OUT, and quantize that."""
    from moeconv.quantize.proof import prove_packing

    def write(folder: Path) -> None:
        meter.note(f"writing the pruned model beside OUT ({first.nbytes} bytes)")
        jobs = request.write.jobs or default_jobs()
        execute(first, source=model.checkpoint, out=folder / _PRUNED, jobs=jobs, overwrite=True)

    pruned = open_model(measured.once("pruned", write, resumes=True)[0] / _PRUNED)
    plan = plan_packing(pruned, request).plan
    return run_plan(
        plan, pruned, request.out, request.write, check=lambda staged: prove_packing(plan, pruned, staged),
        measured=measured, meter=meter,
    )  # fmt: skip


def can_fuse(request: PruneRequest, then: QuantizeRequest) -> bool:
    """Whether a prune and a quantize need nothing measured, or written, between them."""
    first, second = request.prune, then.quantize
    repairs = first.refit or first.sequential or first.merge or first.distill or first.curve
    decided = second.method != "gptq" and second.scheme != MIXED and FORMATS[second.format].shard is None
    return decided and not repairs and not any(w.part or w.dry_run for w in (request.write, then.write))
