"""Steps that write a checkpoint by a plan: upcycle, prune, quantize, and applying what tune trained."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moeconv.checkpoint.reader import SafetensorsFile
from moeconv.checkpoint.staging import StagingLock
from moeconv.errors import UsageError, escape
from moeconv.families.model import Model
from moeconv.options import (
    DataOptions,
    MeasureOptions,
    PlanOptions,
    PruneOptions,
    QuantizeOptions,
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
from moeconv.steps.common import check_out, measuring, named, open_resolved, run_plan, scratch
from moeconv.steps.hub import resolve
from moeconv.steps.pruning.step import prune
from moeconv.world import current, first

_CODES, _OVERLAY = "codes.safetensors", "overlay.safetensors"


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
        from moeconv.quantize.planner import plan_quantize

        apart = plan_separate(model)
        second = plan_quantize(
            model if apart is None else planned_model(apart),
            importance=_importance(model, values),
            **named(values, QuantizeOptions, PlanOptions),
        )
        if apart is None:
            return second
        fused = fuse(apart, second)
        assert fused is not None  # it reads ranges alone
        return replace(fused, earlier=apart.earlier)
    return None


# -- quantize ----------------------------------------------------------------------------------------------------------


def prune_and_quantize(
    source: str, out: str, values: Mapping[str, Any], then: Mapping[str, Any], *, meter: Meter
) -> dict[str, Any]:
    """Prune with `values`, quantize with `then`, in one pass: only the quantized model is written, to `out`.

    The JSON is quantize's, with prune's block beside it. Only where `can_fuse` says so. Where the one reads parts of
    what the other computes, the pruned model lies in TMPDIR for a while.
    """
    from moeconv.report.proof import prove_packing

    def run(
        plan: Plan, model: Model, out: str, values: Mapping[str, Any], *, lock: StagingLock, **more: Any
    ) -> dict[str, Any]:
        second = plan_step("quantize", planned_model(plan), then)
        fused = None if second is None else fuse(plan, second)
        joint = dict(values) | {k: v for k, v in then.items() if k in WriteOptions.__dataclass_fields__}
        if fused is None:  # a part of what is computed, as of cast experts that lie in one tensor
            quantizing = dict(then) | {k: v for k, v in joint.items() if k in WriteOptions.__dataclass_fields__}
            result = _after(plan, model, out, quantizing, note="writing the pruned model", meter=meter)
        else:
            result = run_plan(
                fused, model, out, joint, check=lambda staged: prove_packing(fused, model, staged), meter=meter,
                lock=lock,
            )  # fmt: skip
        between = {"bytes": planned_model(plan).checkpoint.nbytes, "total": plan.params_total}
        return result | {"prune": dict(plan.block), "between": between | {"active": plan.params_active}}

    return prune(source, out, values, meter=meter, run=run)


def can_fuse(values: Mapping[str, Any], then: Mapping[str, Any]) -> bool:
    """Whether a prune and a quantize with these parameters need nothing measured, or written, between them."""
    first, second = take(PruneOptions, values), take(QuantizeOptions, then)
    writes = take(WriteOptions, values), take(WriteOptions, then)
    repairs = first.refit or first.sequential or first.merge or first.distill or first.curve
    decided = second.method != "gptq" and second.scheme != "mixed" and second.format != "gguf"
    return decided and not repairs and not any(w.part or w.dry_run for w in writes)


def _importance(model: Model, values: Mapping[str, Any]) -> dict[int, float] | None:
    """What --stats says of the layers."""
    path = take(QuantizeOptions, values).stats
    if path is None:
        return None
    from moeconv.calibrate.artifact import layer_importance, load_statistics

    statistics = load_statistics(path)
    statistics.check_belongs(model)
    return layer_importance(statistics)


def quantize(source: str, out: str, values: Mapping[str, Any], *, meter: Meter) -> dict[str, Any]:
    """Pack every expert, then decode a sample of what was written and compare it with the source."""
    model = open_resolved(source)
    options, write = take(QuantizeOptions, values), take(WriteOptions, values)
    if (options.method == "gptq") != bool(take(DataOptions, values).data):
        text = (
            "--method gptq needs --data" if options.method == "gptq" else f"--method {options.method} reads no --data"
        )
        raise UsageError(text, hint="gptq chooses codes by what the experts are given: moeconv quantize --data FILE.")
    if model.quantization and options.requantize:
        return _requantize(model, out, values, meter=meter)
    plan = plan_step("quantize", model, values)
    assert plan is not None

    def check(staged: Path) -> dict[str, Any]:
        from moeconv.report.proof import prove_packing

        assert plan is not None
        return prove_packing(plan, model, staged)

    if options.method != "gptq" or write.dry_run:
        return run_plan(plan, model, out, values, meter=meter, check=check)
    if (apart := plan_separate(model)) is not None:
        return _after(apart, model, out, values, note="writing the experts apart", meter=meter)
    check_out(out, model, values)
    from moeconv.gptq.run import choose_codes
    from moeconv.quantize.planner import plan_quantize

    packed = [
        item
        for item in plan.items()
        if item.changed == "expert" and item.inputs and model.roles[item.inputs[0].tensor].layer in model.moe_layers
    ]  # multi-token-prediction layers are not run: their experts keep the searched scales
    asked = named(values, DataOptions, MeasureOptions)
    seed = take(PlanOptions, values).seed

    def measure(folder: Path) -> dict[str, Any]:
        path = folder / _CODES
        return choose_codes(model, packed, path, damping=options.damping, seed=seed, meter=meter, **asked)

    groups = (QuantizeOptions, PlanOptions, DataOptions, MeasureOptions)
    with measuring("quantize", model, out, values, *groups, meter=meter) as measured:
        folder, found = measured.once("codes", measure)
        overlay = SafetensorsFile(folder / _CODES)
        importance = _importance(model, values)
        plan = plan_quantize(
            model, overlay=overlay, importance=importance, **named(values, QuantizeOptions, PlanOptions)
        )
        result = run_plan(
            plan, model, out, values, meter=meter, check=check, origins={ORIGIN: overlay}, lock=measured.lock
        )
    result["quantize"].setdefault("error", {})["output"] = found
    return result


def _requantize(model: Model, out: str, values: Mapping[str, Any], *, meter: Meter) -> dict[str, Any]:
    """Decode a quantized source into a scratch directory, and quantize that."""
    from moeconv.quantize.decode import plan_decode

    decoded = plan_decode(model)
    planned = plan_step("quantize", planned_model(decoded), values)  # refused before anything is decoded
    assert planned is not None
    if take(WriteOptions, values).dry_run:
        return run_plan(planned, model, out, values, meter=meter)
    return _after(decoded, model, out, values, note="decoding the source", meter=meter)


def _after(
    first: Plan, model: Model, out: str, values: Mapping[str, Any], *, note: str, meter: Meter
) -> dict[str, Any]:
    """Write what `first` plans into a scratch directory, and quantize that."""
    write = take(WriteOptions, values)
    check_out(out, model, values)
    with scratch() as folder:
        meter.note(f"{note} into {escape(folder)} ({first.nbytes} bytes)")
        plain = os.path.join(folder, "plain")
        execute(first, source=model.checkpoint, out=plain, jobs=write.jobs or default_jobs())
        result = quantize(plain, out, values, meter=meter)
    result["warnings"] = list(dict.fromkeys([*first.warnings, *result["warnings"]]))
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
        overlay = SafetensorsFile(folder / _OVERLAY)
        plan = plan_overlay(model, overlay, **named(values, PlanOptions))
        result = run_plan(
            plan, model, out, values, meter=meter, origins={ORIGIN: overlay}, figures=block, lock=measured.lock
        )
    result["warnings"] += block.pop("warnings", [])
    result["seconds"] = round(result["seconds"] + block["seconds"], 3)  # training, then writing
    result["tune"] |= block
    return result
