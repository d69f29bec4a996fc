"""The prune step: what is measured for a plan, the plan, and its execution."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeconv.checkpoint.overlay import Overlay
from moeconv.errors import UsageError
from moeconv.families.model import Model
from moeconv.options import (
    CalibrateOptions,
    DataOptions,
    MeasureOptions,
    PlanOptions,
    PruneOptions,
    StatisticsOptions,
    WriteOptions,
    take,
)
from moeconv.plan.meter import Meter
from moeconv.prune import choice, limits, planner
from moeconv.prune.criteria import Evidence
from moeconv.prune.curve import curve
from moeconv.prune.evidence import covers, evidence_of, gathered, settle
from moeconv.prune.gates import cost, decided
from moeconv.prune.repairs import REPAIRS, distilled, left_of, merged, remarks_on, repaired
from moeconv.runner.run import check_out, measuring, named, open_resolved, planned_memory, run_plan
from moeconv.stream.need import PRUNED

Run = Callable[..., dict[str, Any]]  # as run_plan


def prune(
    source: str, out: str | None, values: Mapping[str, Any], *, meter: Meter, run: Run = run_plan
) -> dict[str, Any]:
    """Remove experts: by statistics, by data that is calibrated on first, or by the weights alone. `run` executes the
    plan that was decided."""
    model = open_resolved(source)
    options, data = take(PruneOptions, values), take(DataOptions, values).data
    write = take(WriteOptions, values)
    parameters = named(values, PruneOptions, PlanOptions)
    parameters["criterion"] = choice.resolve_criterion(
        options.criterion, has_data=bool(options.stats or data), model=model
    )
    measures = [n for n in (*REPAIRS, "curve") if getattr(options, n)]
    measures += ["max_loss_increase"] if options.max_loss_increase is not None else []
    judged = options.top_k is not None and bool(data)  # what a change of top-k costs
    if measures and not data and not write.dry_run:
        flag = "--" + measures[0].replace("_", "-")
        raise UsageError(f"{flag} runs the model on text", hint="Pass --data FILE, with --stats or without.")
    if options.stats and data and not measures and not judged:
        raise UsageError("--stats and --data exclude each other", hint="Statistics hold what the data gave.")
    if options.merge and not (options.stats or data):
        raise UsageError("--merge needs statistics", hint="Pass --data FILE, or --stats STATS too.")
    if covers(options) and not (options.stats or data):
        raise UsageError("--protect-coverage needs statistics", hint="Pass --data FILE, or --stats STATS.")
    if options.curve:
        return curve(model, out, values, parameters, meter=meter)
    if out is None:
        raise UsageError("prune needs OUT, the directory to write", hint="Only --curve writes no model.")
    limits.check_prune(model, **parameters)  # before anything is measured
    check_out(out, model, values)
    if write.dry_run:
        evidence = evidence_of(model, options.stats, parameters, twin=take(StatisticsOptions, values).stats_of_twin)
        settle(model, evidence, options, parameters)
        result = run_plan(planner.plan_prune(model, evidence=evidence, **parameters), model, out, values, meter=meter)
        if data:
            told = planned_memory(model, values, PRUNED)
            result |= {"memory": told["memory"], "warnings": [*result["warnings"], *told["warnings"]]}
        return result
    groups = (PruneOptions, PlanOptions, DataOptions, MeasureOptions, CalibrateOptions)
    with measuring("prune", model, out, values, *groups, meter=meter) as measured:
        evidence = gathered(model, values, parameters, measured, meter=meter)
        warnings = settle(model, evidence, options, parameters)
        made = _Decision()
        if measures or judged:
            folder, found = measured.once(
                "decision", lambda folder: _decide(model, evidence, values, parameters, str(folder), meter=meter)
            )
            made = _Decision.read(folder, found)
        plan = planner.plan_prune(
            model, evidence=evidence, keep_experts=made.keep, overlays=made.overlays or None, groups=made.groups,
            **parameters,
        )  # fmt: skip
        result = run(plan, model, out, values, meter=meter, origins=made.overlays or None, measured=measured)
    result["prune"] |= made.extra
    result["warnings"] += [*warnings, *remarks_on(made.extra)]
    return result


@dataclass(frozen=True)
class _Decision:
    """What running the model on text decided: keep sets, groups that merge, overlays by origin, figures."""

    keep: dict[int, list[int]] | None = None
    groups: dict[int, dict[int, list[int]]] | None = None
    overlays: Mapping[str, Overlay] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, found: Mapping[str, Any]) -> _Decision:
        """From what `_decide` returned, as JSON gives it back."""
        keep, groups = found["keep"], found["groups"]
        return cls(
            None if keep is None else {int(at): kept for at, kept in keep.items()},
            None if groups is None else {int(at): {int(e): g for e, g in of.items()} for at, of in groups.items()},
            {origin: Overlay(folder / name) for origin, name in found["overlays"].items()},
            found["extra"],
        )


def _decide(
    model: Model, evidence: Evidence, values: Mapping[str, Any], parameters: Mapping[str, Any], folder: str, *,
    meter: Meter,
) -> dict[str, Any]:  # fmt: skip
    """Everything that takes passes over the model: {keep, groups, overlays {origin: file in `folder`}, extra}."""
    options = take(PruneOptions, values)
    keep, extra = decided(model, evidence, values, parameters, meter=meter)
    if options.top_k is not None and take(DataOptions, values).data and not extra:
        extra = cost(model, evidence, values, parameters, meter=meter)
    overlays: dict[str, Overlay] = {}
    groups: Any = None
    if options.sequential or options.refit:
        left = left_of(model, evidence, keep, parameters)
        overlays, keep, fared = repaired(model, evidence, keep, left, values, parameters, folder, meter=meter)
        extra |= fared
    if options.merge:
        overlays, groups, keep = merged(model, evidence, keep, values, parameters, folder, meter=meter)
    if options.distill:
        found = distilled(model, evidence, keep, overlays, values, parameters, folder, meter=meter)
        overlays, extra = overlays | {"tuned": found[0]}, extra | {"distill": found[1]}
    names = {origin: file.path.name for origin, file in overlays.items()}
    return {"keep": keep, "groups": groups, "overlays": names, "extra": extra}
