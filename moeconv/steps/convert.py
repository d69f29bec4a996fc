"""Steps that write a checkpoint by a plan: upcycle, prune, quantize, and applying what tune trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moeconv.checkpoint.overlay import Overlay
from moeconv.checkpoint.staging import Measured
from moeconv.errors import UsageError
from moeconv.families.model import Model, open_model
from moeconv.options import (
    DataOptions,
    MeasureOptions,
    PlanOptions,
    PruneOptions,
    QuantizeOptions,
    StatisticsOptions,
    TuneOptions,
    UpcycleOptions,
    WriteOptions,
    take,
)
from moeconv.plan.execute import default_jobs, execute
from moeconv.plan.fuse import fuse
from moeconv.plan.meter import Meter
from moeconv.plan.overlay import ORIGIN
from moeconv.plan.plan import Plan
from moeconv.plan.planned import planned_model
from moeconv.quantize.separate import plan_separate
from moeconv.steps.common import check_out, measuring, named, open_resolved, planned_memory, run_plan
from moeconv.steps.hub import resolve
from moeconv.steps.pruning.step import prune
from moeconv.stream.need import GPTQ
from moeconv.units import human_bytes
from moeconv.world import current, first

_CODES, _OVERLAY, _PRUNED = "codes", "overlay", "pruned"


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


# -- quantize ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Packing:
    """A plan of packing, read from the source, and the model whose weights it packs: the source, decoded where it is
    quantized, with its experts taken apart."""

    plan: Plan
    view: Model


def plan_packing(model: Model, values: Mapping[str, Any], *, overlay: Overlay | None = None) -> _Packing:
    """Plan a quantize; `overlay` has codes that data chose, for weights of the view."""
    from moeconv.quantize.decode import plan_decode
    from moeconv.quantize.planner import plan_quantize

    view, before, where = model, list[Plan](), model.checkpoint.path
    importance, twin = _importance(model, values)
    if model.quantization and take(QuantizeOptions, values).requantize:
        before.append(plan_decode(model))
        view = planned_model(before[-1], companions=where)
    if (apart := plan_separate(view)) is not None:
        before.append(apart)
        view = planned_model(apart, companions=where)
    plan = plan_quantize(
        view, overlay=overlay, importance=importance, stats_of_twin=twin, **named(values, QuantizeOptions, PlanOptions)
    )
    for made in reversed(before):
        fused = fuse(made, plan)
        assert fused is not None  # it decodes, and reads ranges
        # that experts were taken apart says nothing of the model: no step of its own
        plan = fused if made.command == "decode" else replace(fused, earlier=plan.earlier)
    return _Packing(replace(plan, warnings=(*plan.warnings, *_grown(plan, model))), view)


def _grown(plan: Plan, source: Model) -> list[str]:
    """The warning that packing made a checkpoint larger: one whose experts have fewer bits already."""
    before, after = source.checkpoint.nbytes, plan.nbytes
    if after <= before:
        return []
    kind = f" ({source.quantization.get('quant_method')} already)" if source.quantization else ""
    return [f"the result is larger than its source{kind}: {human_bytes(after)} against {human_bytes(before)}"]


def prune_and_quantize(
    source: str, out: str, values: Mapping[str, Any], then: Mapping[str, Any], *, meter: Meter
) -> dict[str, Any]:
    """Prune with `values`, quantize with `then`, in one pass: only the quantized model is written, to `out`.

    The JSON is quantize's, with prune's block beside it. Only where `can_fuse` says so. Where the one reads parts of
    what the other computes, the pruned model lies beside OUT for a while.
    """
    from moeconv.report.proof import prove_packing

    def run(
        plan: Plan, model: Model, out: str, values: Mapping[str, Any], *, measured: Measured, **more: Any
    ) -> dict[str, Any]:
        second = plan_step("quantize", planned_model(plan), then)
        fused = None if second is None else fuse(plan, second)
        joint = dict(values) | {k: v for k, v in then.items() if k in WriteOptions.__dataclass_fields__}
        if fused is None:  # a part of what is computed, as of cast experts that lie in one tensor
            quantizing = dict(then) | {k: v for k, v in joint.items() if k in WriteOptions.__dataclass_fields__}
            result = _after(plan, model, out, quantizing, measured=measured, meter=meter)
        else:
            result = run_plan(
                fused, model, out, joint, check=lambda staged: prove_packing(fused, model, staged), meter=meter,
                measured=measured,
            )  # fmt: skip
        between = {"bytes": planned_model(plan).checkpoint.nbytes, "total": plan.params_total}
        return result | {"prune": dict(plan.block), "between": between | {"active": plan.params_active}}

    return prune(source, out, values, meter=meter, run=run)


def _after(
    first: Plan, model: Model, out: str, values: Mapping[str, Any], *, measured: Measured, meter: Meter
) -> dict[str, Any]:
    """Write what `first` plans beside OUT, and quantize that."""
    from moeconv.report.proof import prove_packing

    def write(folder: Path) -> None:
        meter.note(f"writing the pruned model beside OUT ({first.nbytes} bytes)")
        jobs = take(WriteOptions, values).jobs or default_jobs()
        execute(first, source=model.checkpoint, out=folder / _PRUNED, jobs=jobs, overwrite=True)

    pruned = open_model(measured.once("pruned", write, resumes=True)[0] / _PRUNED)
    plan = plan_packing(pruned, values).plan
    return run_plan(
        plan, pruned, out, values, check=lambda staged: prove_packing(plan, pruned, staged), measured=measured,
        meter=meter,
    )  # fmt: skip


def can_fuse(values: Mapping[str, Any], then: Mapping[str, Any]) -> bool:
    """Whether a prune and a quantize with these parameters need nothing measured, or written, between them."""
    first, second = take(PruneOptions, values), take(QuantizeOptions, then)
    writes = take(WriteOptions, values), take(WriteOptions, then)
    repairs = first.refit or first.sequential or first.merge or first.distill or first.curve
    decided = second.method != "gptq" and second.scheme != "mixed" and second.format != "gguf"
    return decided and not repairs and not any(w.part or w.dry_run for w in writes)


def _importance(model: Model, values: Mapping[str, Any]) -> tuple[dict[int, float] | None, str | None]:
    """What --stats says of the layers, and the fingerprint of the twin that they are of, if of one."""
    path = take(QuantizeOptions, values).stats
    if path is None:
        return None, None
    from moeconv.calibrate.artifact import layer_importance, load_statistics

    statistics = load_statistics(path)
    twin = statistics.check_belongs(model, twin=take(StatisticsOptions, values).stats_of_twin)
    return layer_importance(statistics), twin


def quantize(source: str, out: str, values: Mapping[str, Any], *, meter: Meter) -> dict[str, Any]:
    """Pack every expert, then decode a sample of what was written and compare it with the source."""
    model = open_resolved(source)
    options, write = take(QuantizeOptions, values), take(WriteOptions, values)
    if (options.method == "gptq") != bool(take(DataOptions, values).data):
        text = (
            "--method gptq needs --data" if options.method == "gptq" else f"--method {options.method} reads no --data"
        )
        raise UsageError(text, hint="gptq chooses codes by what the experts are given: moeconv quantize --data FILE.")
    packing = plan_packing(model, values)
    plan = before = packing.plan

    def check(staged: Path) -> dict[str, Any]:
        from moeconv.report.proof import prove_packing

        return prove_packing(plan, model, staged, before=before)

    if options.method != "gptq" or write.dry_run:
        result = run_plan(plan, model, out, values, meter=meter, check=check)
        if options.method == "gptq":
            told = planned_memory(model, values, GPTQ)
            result |= {"memory": told["memory"], "warnings": [*result["warnings"], *told["warnings"]]}
        return result
    check_out(out, model, values)
    from moeconv.gptq.run import choose_codes, remarks_on

    chosen = [
        item
        for item in before.items()
        if item.changed == "expert" and item.inputs and model.roles[item.inputs[0].tensor].layer in model.moe_layers
    ]  # multi-token-prediction layers are not run: their experts keep the searched scales
    asked = named(values, DataOptions, MeasureOptions)
    seed = take(PlanOptions, values).seed

    def measure(folder: Path) -> dict[str, Any]:
        path = folder / _CODES
        return choose_codes(
            model, chosen, path, damping=options.damping, view=packing.view, seed=seed, meter=meter, **asked
        )

    groups = (QuantizeOptions, PlanOptions, DataOptions, MeasureOptions)
    with measuring("quantize", model, out, values, *groups, meter=meter) as measured:
        folder, found = measured.once("codes", measure)
        overlay = Overlay(folder / _CODES)
        plan = plan_packing(model, values, overlay=overlay).plan
        result = run_plan(
            plan, model, out, values, meter=meter, check=check, origins={ORIGIN: overlay}, measured=measured
        )
    result["quantize"].setdefault("error", {})["output"] = found
    result["warnings"] += remarks_on(found)
    return result


# -- tune --------------------------------------------------------------------------------------------------------------


def tune(source: str, out: str, values: Mapping[str, Any], *, meter: Meter) -> dict[str, Any]:
    """Train the router (and what --train names) into an overlay, then apply the overlay."""
    from moeconv.tune.planner import plan_overlay

    write = take(WriteOptions, values)
    if write.dry_run:
        raise UsageError(
            "--dry-run never measures, and what tune writes is decided by training",
            hint="The result has the size of its input: see `moeconv inspect`.",
        )
    model = open_resolved(source)
    check_out(out, model, values)
    from moeconv.tune.run import tune as train

    asked = named(values, TuneOptions, DataOptions, MeasureOptions)
    if asked["teacher"]:
        asked["teacher"] = resolve(asked["teacher"])
    seed, begun = take(PlanOptions, values).seed, False

    def measure(folder: Path) -> dict[str, Any]:
        return train(str(model.checkpoint.path), folder / _OVERLAY, seed=seed, meter=meter, **asked)

    def together(folder: Path) -> dict[str, Any]:
        nonlocal begun
        begun = first(lambda: True)
        return measure(folder)

    if not current().leads:  # it has part in the work, when the first process finds that there is any
        return {"command": "tune", "output": out, "tune": measure(Path(out)) if first(lambda: True) else {}}
    groups = (TuneOptions, PlanOptions, DataOptions, MeasureOptions)
    with measuring("tune", model, out, values, *groups, meter=meter) as measured:
        folder, block = measured.once("overlay", together)
        if not begun:
            first(lambda: False)
        overlay = Overlay(folder / _OVERLAY)
        plan = plan_overlay(model, overlay, **named(values, PlanOptions))
        result = run_plan(
            plan, model, out, values, meter=meter, origins={ORIGIN: overlay}, figures=block, measured=measured
        )
    result["warnings"] += block.pop("warnings", [])
    result["seconds"] = round(result["seconds"] + block["seconds"], 3)  # training, then writing
    result["tune"] |= block
    return result
