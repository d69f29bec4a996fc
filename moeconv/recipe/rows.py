"""The JSON of `moeconv run`: one row per step, and the summary around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moeconv.contract import Counts, Ran, StepRow
from moeconv.families.model import Model
from moeconv.plan.build import count_params
from moeconv.recipe.read import Recipe
from moeconv.types import JsonObject

WRITERS = ("import", "upcycle", "tune", "prune", "quantize", "arrange", "collapse")  # steps that write a checkpoint


def row_of_model(name: str, model: Model, *, seconds: float, evaluation: JsonObject | None = None) -> StepRow:
    """The row of a step that wrote `model`, with the losses of its `evaluation` where there was one."""
    total, active = count_params(model)
    found = evaluation or {}
    return {
        "step": name,
        "total": total,
        "active": active,
        "bytes": model.checkpoint.nbytes,
        "loss": found.get("loss"),
        "kl": found.get("kl"),
        "seconds": round(seconds, 3),
    }


def row_of_sizes(name: str, parameters: Counts, nbytes: int, *, seconds: float) -> StepRow:
    """The row of an output that moeconv cannot open (GGUF), and therefore not evaluate."""
    return {
        "step": name,
        "total": parameters["total"],
        "active": parameters["active"],
        "bytes": nbytes,
        "loss": None,
        "kl": None,
        "seconds": round(seconds, 3),
    }


def row_of_measurement(name: str, result: Mapping[str, object], *, seconds: float) -> StepRow:
    """The row of a step that measures: the figures of its result that a table shows."""
    row: StepRow = {"step": name, "seconds": round(seconds, 3)}
    loss, kl, passed = (result.get(key) for key in ("loss", "kl", "passed"))
    if "loss" in result:
        row["loss"] = loss if isinstance(loss, float) else None
    if "kl" in result:
        row["kl"] = kl if isinstance(kl, float) else None
    if isinstance(passed, bool):
        row["passed"] = passed
    elif isinstance(ok := result.get("ok"), bool):  # verify
        row["passed"] = ok
    return row


def summary(recipe: Recipe, rows: list[StepRow], warnings: Sequence[str], *, dry_run: bool) -> Ran:
    """The JSON object of the command; `output` is the last checkpoint, or the source if no step writes one."""
    written = [step.to for step in recipe.steps if step.command in WRITERS and step.to is not None]
    return {
        "command": "run",
        "recipe": recipe.name,
        "dry_run": dry_run,
        "output": written[-1] if written else recipe.steps[-1].source,
        "steps": rows,
        "warnings": list(warnings),
    }
