"""The step `prune`: it measures what the decision needs, decides, plans, and executes the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from moeconv.checkpoint.overlay import Overlay
from moeconv.errors import UsageError
from moeconv.families.model import Model
from moeconv.options import PruneOptions, flag_of
from moeconv.plan.meter import Meter
from moeconv.prune import choice, limits, mix, planner, width
from moeconv.prune.criteria import Evidence
from moeconv.prune.curve import curve
from moeconv.prune.decision import Decision, decide
from moeconv.prune.evidence import CALIBRATE, calibrated, covers, evidence_of, gathered, with_criterion
from moeconv.prune.gates import cost, smallest
from moeconv.prune.need import pruned_workload
from moeconv.prune.points import points_of
from moeconv.prune.repairs import REPAIRS, Repaired, distilled, merged, neurons_of, remarks_on, remove_stale, repaired
from moeconv.requests import PruneRequest
from moeconv.runner.run import check_out, measuring, open_resolved, planned_memory, run_on_data, run_plan
from moeconv.stream.need import need_of
from moeconv.types import Config, JsonObject
from moeconv.world import announce, check_alone, current, follow

RunPlan = Callable[..., JsonObject]  # with the parameters of run_plan
_REPAIR = "repair"


def prune(request: PruneRequest, *, meter: Meter, run: RunPlan = run_plan) -> JsonObject:
    """Remove experts: by statistics, by data (on which the model is calibrated first), or by the weights alone. `run`
    executes the plan."""
    model = open_resolved(request.model)
    named, has_data = request.prune.criterion is not None, bool(request.prune.stats or request.data.data)
    request = replace(request, prune=choice.with_default(request.prune, has_data=has_data, model=model))
    _check_data(request)
    if request.prune.curve:
        check_alone("prune --curve", hint="Run it without torchrun.")
        return dict(curve(model, request, named=named, meter=meter))
    out, write = request.out, request.write
    if out is None:
        raise UsageError(
            "prune needs OUT, the directory to write", hint="Name a directory. Only --curve can run without OUT."
        )
    left = limits.check_prune(model, request.prune, request.plan)  # before anything is measured
    if request.prune.mix is not None:
        points_of(model, request.prune, request.plan)
    if model.num_experts:
        choice.check_used(request.prune, str(request.prune.criterion), has_data=has_data)
    check_out(out, model, write)
    if write.dry_run:
        return _dry_run(model, request, out, left=left, named=named, meter=meter)
    _check_processes(request)
    if not current().leads:
        follow({
            CALIBRATE: lambda asked, folder: calibrated(model, asked, folder, meter=meter),
            _REPAIR: lambda asked, found, before, folder: repaired(model, found, asked, before, folder, meter=meter),
        })  # fmt: skip
        return {"command": "prune", "output": out, "prune": {}}
    decides = (request.prune, request.plan, request.data, request.measure, request.calibrate)
    with measuring("prune", model, out, write, *decides, meter=meter) as measured:
        evidence = gathered(model, request, measured, left=left, meter=meter)
        request, warnings = with_criterion(model, evidence, request, named=named)
        options = request.prune
        decision, made = None, _Stored()
        if options.max_loss_increase is None and options.mix is None:
            decision = decide(model, options, request.plan, evidence, left=left)
        if _text_options(options) or _measures_top_k(request) or width.asks_width(options):
            asked, begun = request, decision
            folder, found = measured.once(
                "decision", lambda folder: _measured(model, evidence, asked, begun, folder, meter=meter), resumes=True
            )
            made = _Stored.read(folder, found)
        if made.keep is not None:
            size = mix.width_of(model, options, request.plan, made.width) if decision is None else decision.width
            decision = decide(model, options, request.plan, evidence, left=left, keep=made.keep)
            decision = replace(decision, width=size)
        announce(None)
        assert decision is not None
        decision = replace(decision, groups=made.groups)
        plan = planner.prune_plan(
            model, options, request.plan, decision, evidence=evidence, overlays=made.overlays or None
        )
        result = run(
            plan, model, out, write, meter=meter, origins=made.overlays or None, measured=measured,
            figures=made.figures,
        )  # fmt: skip
    result["prune"] |= made.figures
    result["warnings"] += [*warnings, *remarks_on(made.figures)]
    return result


def _dry_run(
    model: Model, request: PruneRequest, out: str, *, left: int | None, named: bool, meter: Meter
) -> JsonObject:
    """The plan and the memory that the run will take. Experts that only measurements can decide stay undecided."""
    evidence = evidence_of(model, request.prune.stats, request)
    request, _ = with_criterion(model, evidence, request, named=named)
    decision = decide(model, request.prune, request.plan, evidence, left=left)
    plan = planner.prune_plan(model, request.prune, request.plan, decision, evidence=evidence)
    result = run_plan(plan, model, out, request.write, meter=meter)
    if request.data.data:
        left = decision.left
        load = pruned_workload(
            model, refitted=left * request.prune.refit, healed=left * bool(request.prune.heal),
            narrowed=(left or 1) * (decision.width is not None), shared=decision.width is not None,
        )  # fmt: skip
        asked = run_on_data(model, request.measure, load)
        planned = planned_memory(need_of(model, asked), asked, request.measure)
        result |= {"memory": planned["memory"], "warnings": [*result["warnings"], *planned["warnings"]]}
    return result


def _check_processes(request: PruneRequest) -> None:
    """Raises UsageError if several processes were started for a prune that only one can do."""
    options = request.prune
    if not request.data.data:
        check_alone("prune without --data", hint="Run it without torchrun; --part I/N shares the work.")
    given = [name for name in ("merge", "distill", "max_loss_increase", "mix") if getattr(options, name)]
    given += [n for n in ("width", "width_ratio", "shared_width", "top_k") if getattr(options, n) is not None]
    if given:
        check_alone(f"prune {flag_of(given[0])}", hint="Run it without torchrun.")


def _text_options(options: PruneOptions) -> list[str]:
    """The names of the given options, other than the criterion, for which the model is run on text."""
    asked = [name for name in (*REPAIRS, "mix", "curve") if getattr(options, name)]
    return asked + (["max_loss_increase"] if options.max_loss_increase is not None else [])


def _measures_top_k(request: PruneRequest) -> bool:
    """Whether the cost of a changed top-k is measured."""
    return request.prune.top_k is not None and bool(request.data.data)


def _check_data(request: PruneRequest) -> None:
    """Raises UsageError if --data and --stats do not go with the other options."""
    options, data, on_text = request.prune, request.data.data, _text_options(request.prune)
    if on_text and not data and not request.write.dry_run:
        flag = "--" + on_text[0].replace("_", "-")
        raise UsageError(f"{flag} runs the model on text, and there is no --data", hint="Pass --data FILE.")
    reads = on_text or _measures_top_k(request) or width.asks_width(options)
    if options.stats and data and not reads:
        raise UsageError(
            "--stats and --data exclude each other",
            hint="Leave out --data: the statistics already contain what was measured on data.",
        )
    if options.merge and not (options.stats or data):
        raise UsageError("--merge needs statistics", hint="Pass --data FILE, or --stats STATS too.")
    if covers(options) and not (options.stats or data):
        raise UsageError("--protect-coverage needs statistics", hint="Pass --data FILE, or --stats STATS.")


@dataclass(frozen=True)
class _Stored:
    """The results of running the model on text. They are kept as JSON, so that the other parts of a command read
    them."""

    keep: dict[int, list[int]] | None = None
    groups: dict[int, dict[int, list[int]]] | None = None
    overlays: Mapping[str, Overlay] = field(default_factory=dict)
    figures: Config = field(default_factory=dict)
    width: int | None = None

    @classmethod
    def read(cls, folder: Path, found: JsonObject) -> _Stored:
        """Read what `_measured` returned."""
        keep, groups = found["keep"], found["groups"]
        return cls(
            None if keep is None else {int(at): kept for at, kept in keep.items()},
            None if groups is None else {int(at): {int(e): g for e, g in of.items()} for at, of in groups.items()},
            {origin: Overlay(folder / name) for origin, name in found["overlays"].items()},
            found["extra"],
            found["width"],
        )


def _searched(
    model: Model, evidence: Evidence, request: PruneRequest, *, meter: Meter
) -> tuple[Decision, JsonObject]:  # fmt: skip
    """The decision that a search on held-out text makes, and its figures."""
    options, found = request.prune, JsonObject()
    if options.mix is not None:
        best = mix.best_mix(model, evidence, request, meter=meter)
        keep, size, found["mix"] = best.keep, best.width, best.rows
        if options.max_loss_increase is not None:
            found["measured"] = best.cost
    else:
        assert options.max_loss_increase is not None
        keep, cost_of_keep = smallest(model, evidence, request, gate=options.max_loss_increase, meter=meter)
        size = None
        found |= cost_of_keep
    decision = decide(model, options, request.plan, evidence, left=None, keep=keep)
    return replace(decision, width=size), found


def _measured(
    model: Model, evidence: Evidence, request: PruneRequest, decision: Decision | None, folder: Path, *, meter: Meter
) -> JsonObject:  # fmt: skip
    """Do everything that needs passes over the model. Returns {keep, groups, overlays {origin: file in `folder`},
    width, extra}; `keep` is None where the experts of `decision` did not change."""
    options, figures = request.prune, JsonObject()
    remove_stale(folder)
    begun = decision
    if decision is None:
        decision, of_search = _searched(model, evidence, request, meter=meter)
        figures |= of_search
    elif _measures_top_k(request):
        figures |= cost(model, evidence, request, decision, meter=meter)
    made = Repaired(decision, {}, figures)
    size = decision.width
    if options.sequential or options.refit or options.heal or (size is not None and request.data.data):
        announce(_REPAIR, request, replace(evidence, statistics=None, samples={}), made, folder)
        made = repaired(model, evidence, request, made, folder, meter=meter)
    elif size is not None:
        made = replace(made, overlays=neurons_of(size.narrow(model), decision, folder))
    if options.merge:
        made = merged(model, evidence, request, made, folder, meter=meter)
    if options.distill:
        made = distilled(model, evidence, request, made, folder, meter=meter)
    names = {origin: file.path.name for origin, file in made.overlays.items()}
    chosen = made.decision
    return {
        "keep": None if chosen is begun else {layer: list(kept) for layer, kept in chosen.keep.items()},
        "groups": chosen.groups,
        "overlays": names,
        "width": None if chosen.width is None else chosen.width.after,
        "extra": dict(made.figures),
    }
