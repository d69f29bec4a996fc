"""What a step reads: a checkpoint, or for an import a GGUF file."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from moeconv.checkpoint.gguf_source import GgufSource
from moeconv.checkpoint.reader import CONFIG_NAME
from moeconv.contract import Counts, StepRow
from moeconv.families.model import Model
from moeconv.importing.planner import plan_import
from moeconv.plan.plan import Plan
from moeconv.plan.planned import planned_model
from moeconv.recipe.read import Recipe, Step
from moeconv.recipe.rows import row_of_model, row_of_sizes
from moeconv.requests import ImportRequest
from moeconv.runner.run import open_resolved
from moeconv.types import JsonObject


def planned_import(step: Step, *, folder: str | None = None) -> tuple[Plan, Model] | None:
    """(the plan, the model that it writes) of a step that imports a GGUF file; None for any other step. The files
    beside the weights, which the plans of later steps read, are written below `folder`."""
    request = step.asked
    if not isinstance(request, ImportRequest):
        return None
    plan, model = plan_import(GgufSource(request.gguf), request.plan)
    if folder is None:
        return plan, model
    companions = Path(tempfile.mkdtemp(dir=folder))
    for name, text in {**plan.texts, CONFIG_NAME: json.dumps(dict(plan.config))}.items():
        (companions / name).write_text(text, encoding="utf-8")
    return plan, planned_model(plan, companions=companions, name=Path(request.out).name)


def identity_of(step: Step) -> str:
    """The fingerprint of what a step reads."""
    return GgufSource(step.source).identity() if step.command == "import" else open_resolved(step.source).identity


def first_checkpoint(recipe: Recipe) -> str:
    """The first checkpoint of a recipe: what its first step reads, or imports."""
    step = recipe.steps[0]
    return step.to if step.command == "import" and step.to is not None else step.source


def source_row(recipe: Recipe, evaluation: JsonObject | None = None) -> StepRow:
    """The row of what the first step reads."""
    step = recipe.steps[0]
    if (planned := planned_import(step)) is not None:
        plan, _ = planned
        counts: Counts = {"total": plan.params_total, "active": plan.params_active}
        return row_of_sizes("source", counts, GgufSource(step.source).size, seconds=0.0)
    return row_of_model("source", open_resolved(step.source), seconds=0.0, evaluation=evaluation)
