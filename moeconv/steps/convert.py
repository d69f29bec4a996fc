"""Steps that write a checkpoint by a plan: upcycle, prune, quantize, and applying what tune trained."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeconv.checkpoint.output import check_target
from moeconv.checkpoint.reader import SafetensorsFile
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
from moeconv.plan.meter import Meter
from moeconv.plan.overlay import ORIGIN
from moeconv.plan.plan import Plan
from moeconv.steps.common import open_resolved, run_plan
from moeconv.steps.hub import resolve
from moeconv.steps.pruning import named, prune, scratch
from moeconv.steps.upcycling import upcycle
from moeconv.world import current

__all__ = ["plan_step", "prune", "quantize", "tune", "upcycle"]


def plan_step(command: str, model: Model, values: Mapping[str, Any]) -> Plan | None:
    """The plan of a step without measuring anything; None for tune, which keeps every size."""
    if command == "upcycle":
        from moeconv.upcycle.planner import plan_upcycle

        return plan_upcycle(model, **named(values, UpcycleOptions, PlanOptions))
    if command == "prune":
        from moeconv.prune.planner import plan_prune, resolve_criterion

        parameters = named(values, PruneOptions, PlanOptions)
        has_data = bool(values.get("stats") or values.get("data"))
        parameters["criterion"] = resolve_criterion(parameters["criterion"], has_data=has_data)
        return plan_prune(model, **parameters)
    if command == "quantize":
        from moeconv.quantize.planner import plan_quantize

        return plan_quantize(
            model, importance=_importance(model, values), **named(values, QuantizeOptions, PlanOptions)
        )
    return None


# -- quantize ----------------------------------------------------------------------------------------------------------


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
    check_target(Path(os.path.abspath(out)), sources=(model.checkpoint.path,), overwrite=write.overwrite)
    from moeconv.calibrate.codes import choose_codes
    from moeconv.quantize.planner import plan_quantize

    packed = [i for i in plan.items() if i.inputs and i.kernel != "copy" and i.changed == "expert"]
    asked = named(values, DataOptions, MeasureOptions)
    with scratch() as folder:
        path = os.path.join(folder, "codes.safetensors")
        seed = take(PlanOptions, values).seed
        found = choose_codes(model, packed, path, damping=options.damping, seed=seed, meter=meter, **asked)
        overlay = SafetensorsFile(Path(path))
        importance = _importance(model, values)
        plan = plan_quantize(
            model, overlay=overlay, importance=importance, **named(values, QuantizeOptions, PlanOptions)
        )
        result = run_plan(plan, model, out, values, meter=meter, check=check, origins={ORIGIN: overlay})
    result["quantize"].setdefault("error", {})["output"] = found
    return result


def _requantize(model: Model, out: str, values: Mapping[str, Any], *, meter: Meter) -> dict[str, Any]:
    """Decode a quantized source into a scratch directory, and quantize that."""
    from moeconv.plan.planned import planned_model
    from moeconv.quantize.decode import plan_decode

    write = take(WriteOptions, values)
    decoded = plan_decode(model)
    planned = plan_step("quantize", planned_model(decoded), values)  # refused before anything is decoded
    assert planned is not None
    if write.dry_run:
        return run_plan(planned, model, out, values, meter=meter)
    check_target(Path(os.path.abspath(out)), sources=(model.checkpoint.path,), overwrite=write.overwrite)
    with scratch() as folder:
        meter.note(f"decoding the source into {escape(folder)} ({decoded.nbytes} bytes)")
        plain = os.path.join(folder, "decoded")
        execute(decoded, source=model.checkpoint, out=plain, jobs=write.jobs or default_jobs())
        return quantize(plain, out, values, meter=meter)


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
    check_target(Path(os.path.abspath(out)), sources=(model.checkpoint.path,), overwrite=write.overwrite)
    from moeconv.tune.run import tune as train

    asked = named(values, TuneOptions, DataOptions, MeasureOptions)
    if asked["teacher"]:
        asked["teacher"] = resolve(asked["teacher"])
    with scratch() as folder:
        path = os.path.join(folder, "overlay.safetensors")
        block = train(str(model.checkpoint.path), path, seed=take(PlanOptions, values).seed, meter=meter, **asked)
        if not current().leads:
            return {"command": "tune", "output": out, "tune": block}
        overlay = SafetensorsFile(Path(path))
        plan = plan_overlay(model, overlay, **named(values, PlanOptions))
        result = run_plan(plan, model, out, values, meter=meter, origins={ORIGIN: overlay}, figures=block)
    result["warnings"] += block.pop("warnings", [])
    result["seconds"] = round(result["seconds"] + block["seconds"], 3)  # training, then writing
    result["tune"] |= block
    return result
