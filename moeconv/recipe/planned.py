"""The dry run of a recipe: every step is planned on the planned output of the step before it, from headers alone."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from moeconv.collapsing.planner import choice_of_neurons, collapse_of, collapse_plan
from moeconv.contract import Counts, Ran, StepRow
from moeconv.families.model import Model
from moeconv.plan.execute import companions_of, default_jobs
from moeconv.plan.memory import memory_bytes, worker_bytes
from moeconv.plan.plan import Plan
from moeconv.plan.planned import planned_model
from moeconv.prune.choice import with_default
from moeconv.prune.criteria import Evidence
from moeconv.prune.decision import decide
from moeconv.prune.limits import check_prune
from moeconv.prune.planner import prune_plan
from moeconv.quantize.step import plan_packing
from moeconv.recipe.fused import fuses
from moeconv.recipe.guard import guard_recipe
from moeconv.recipe.located import located
from moeconv.recipe.read import Asked, Recipe, Step
from moeconv.recipe.rows import WRITERS, row_of_model, row_of_sizes, summary
from moeconv.recipe.source import planned_import, source_row
from moeconv.requests import CollapseRequest, PruneRequest, QuantizeRequest, UpcycleRequest
from moeconv.runner.run import open_resolved
from moeconv.upcycle.planner import upcycle_plan


def plan_all(recipe: Recipe) -> Ran:
    """The exact sizes in bytes of the output of every step, without running any. Raises the errors that a run would
    raise before it writes."""
    guard_recipe(recipe)
    with tempfile.TemporaryDirectory(prefix="moeconv-run-") as folder:
        return _plan_all(recipe, folder)


def _plan_all(recipe: Recipe, folder: str) -> Ran:
    models: dict[str, Model] = {}  # path -> the model that a step will write there
    rows = [source_row(recipe)]
    warnings: list[str] = []
    unwritten = 0  # bytes of pruned models that are quantized in the same pass
    for at, step in enumerate(recipe.steps):
        made = any(step.source == earlier.to for earlier in recipe.steps[:at])
        if step.command not in WRITERS and made:  # it may be a file that only exists later
            rows.append({"step": step.name, "output": step.to, "seconds": 0.0})
            continue
        with located(recipe, step):
            imported = planned_import(step, folder=folder)
            source = imported[1] if imported else models.get(step.source) or open_resolved(step.source)
        if step.command not in WRITERS:
            rows.append({"step": step.name, "output": step.to, "seconds": 0.0})
            continue
        with located(recipe, step):
            plan = imported[0] if imported else plan_of(source, step.asked)
        row = _planned_row(step, plan, source, models)
        if fuses(recipe, at):
            unwritten += row.get("bytes") or 0
        rows.append(row)
        warnings += [
            f"{step.name}: {text}"
            for text in _warnings(plan, source, on_disk=not imported and step.source not in models)
        ]
    result = summary(recipe, rows, warnings, dry_run=True)
    result["disk_bytes"] = sum(r.get("bytes") or 0 for r in rows[1:]) - unwritten
    result["disk_free_bytes"] = shutil.disk_usage(_existing(Path(os.path.abspath(result["output"])))).free
    return result


def _planned_row(step: Step, plan: Plan | None, source: Model, models: dict[str, Model]) -> StepRow:
    """The row of a step that will write a checkpoint, whose model is added to `models`. Without a plan (tune) all sizes
    stay those of the source."""
    assert step.to is not None
    if plan is not None and plan.gguf:
        counts: Counts = {"total": plan.params_total, "active": plan.params_active}
        row = row_of_sizes(step.name, counts, plan.nbytes, seconds=0.0)
    else:
        companions, name = source.checkpoint.path, Path(step.to).name
        models[step.to] = source if plan is None else planned_model(plan, companions=companions, name=name)
        row = row_of_model(step.name, models[step.to], seconds=0.0)
    row["output"] = step.to
    row["plan_id"] = None if plan is None else plan.plan_id
    row["largest_item_bytes"] = None if plan is None else plan.largest_item
    jobs = step.parameters.get("jobs") or default_jobs(0 if plan is None else worker_bytes(plan))
    row["memory_bytes"] = None if plan is None else memory_bytes(plan, jobs=jobs)
    return row


def _warnings(plan: Plan | None, source: Model, *, on_disk: bool) -> list[str]:
    """The warnings of a plan. If the source is `on_disk` already, also those about its other files, such as the
    tokenizer."""
    if plan is None:
        return []
    return [*plan.warnings, *(companions_of(plan, source.checkpoint).warnings if on_disk else ())]


def _existing(path: Path) -> Path:
    """The path, or the closest directory above it that exists."""
    return next(p for p in (path, *path.parents) if p.is_dir())


def plan_of(model: Model, asked: Asked) -> Plan | None:
    """The plan of a request on a model, which may itself only be planned. None for tune, which keeps every size.

    Nothing is measured: the plan of a prune removes the right number of experts, but not necessarily those that a run
    will.
    """
    if isinstance(asked, UpcycleRequest):
        return upcycle_plan(model, asked.upcycle, asked.plan)
    if isinstance(asked, PruneRequest):
        has_data = bool(asked.prune.stats or asked.data.data)
        options, common = with_default(asked.prune, has_data=has_data, model=model), asked.plan
        left = check_prune(model, options, common)
        decision = decide(model, options, common, Evidence(), left=left)
        return prune_plan(model, options, common, decision, evidence=Evidence())
    if isinstance(asked, QuantizeRequest):
        return plan_packing(model, asked).plan
    if isinstance(asked, CollapseRequest):
        how = choice_of_neurons(asked.collapse, has_data=bool(asked.data.data))
        return collapse_plan(collapse_of(model, asked.collapse, asked.plan), asked.collapse, asked.plan, neurons=how)
    return None
