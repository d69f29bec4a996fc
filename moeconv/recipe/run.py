"""Running a recipe: each step reads the output of an earlier one. Finished steps of an unchanged recipe are kept."""

from __future__ import annotations

import os
import time

from moeconv.checkpoint.paths import follow_links
from moeconv.contract import Ran, StepRow
from moeconv.errors import CheckError, escape
from moeconv.evaluate.gates import failure
from moeconv.families.model import open_model
from moeconv.options import WriteOptions
from moeconv.plan.meter import Meter
from moeconv.quantize.formats import FORMATS
from moeconv.recipe.fused import fuses, prune_and_quantize
from moeconv.recipe.guard import guard_recipe
from moeconv.recipe.ledger import kept_or_run, key_of, key_of_fused
from moeconv.recipe.located import located, place
from moeconv.recipe.planned import plan_all
from moeconv.recipe.read import READERS, Recipe, Step, asked, load_recipe
from moeconv.recipe.rows import WRITERS, row_of_measurement, row_of_model, row_of_sizes, summary
from moeconv.recipe.saved import save_recipe
from moeconv.recipe.source import first_checkpoint, source_row
from moeconv.report.step import report
from moeconv.requests import (
    EvaluateRequest,
    PruneRequest,
    QuantizeRequest,
    RunRequest,
)
from moeconv.steps import run_request, timed
from moeconv.types import Config, JsonObject

_WRITE = frozenset(WriteOptions.__dataclass_fields__)


def run_recipe(
    path: str, *, meter: Meter, settings: tuple[str, ...] = (), out: str | None = None, dry_run: bool = False
) -> Ran:
    """Run, or with `dry_run` plan, every step of a recipe file. `settings` are values of variables, as KEY=VALUE.
    `out` is the directory of the relative paths that the steps write (None: the working directory).

    Returns the JSON object of `moeconv run`. Raises UsageError for a recipe that is wrong, CheckError for a gate that
    fails, and what the steps raise.
    """
    recipe = load_recipe(path, settings=settings, out=out)
    # if one step allows links that leave a checkpoint's directory, the whole recipe does: later steps read its output
    with follow_links(any(step.parameters.get("follow_links") for step in recipe.steps)):
        return plan_all(recipe) if dry_run else run_all(recipe, meter=meter)


def run_file(request: RunRequest, *, meter: Meter) -> Ran:
    """`moeconv run`."""
    return run_recipe(
        request.recipe, settings=request.run.set, out=request.run.out, dry_run=request.run.dry_run, meter=meter
    )


def run_all(recipe: Recipe, *, meter: Meter) -> Ran:
    """Run the steps in order; the first that fails ends the run with its error."""
    guard_recipe(recipe)
    source = recipe.steps[0].source
    of_source = _evaluation(recipe, source, meter) if source == first_checkpoint(recipe) else None
    rows = [source_row(recipe, of_source)]
    warnings: list[str] = []
    pending: Step | None = None  # a prune that runs in the same pass as the quantize after it
    for at, step in enumerate(recipe.steps):
        meter.note(f"== {step.name}")
        began = time.monotonic()
        if pending is None and fuses(recipe, at):
            pending = step
            continue
        with located(recipe, step):
            result, kept = _run_or_keep(step, meter) if pending is None else _run_fused(pending, step, meter)
        if kept:
            meter.note("kept: its inputs, parameters and output are unchanged")
        if pending is not None:
            rows.append(_fused_row(pending, step, result, kept=kept))
            pending = None
        row = _row(recipe, step, result, meter, seconds=time.monotonic() - began)
        row["output"], row["kept"], row["result"] = step.to, kept, result
        rows.append(row)
        warnings += [f"{step.name}: {text}" for text in result.get("warnings", ())]
        if result.get("passed") is False and (failed := failure(result)) is not None:
            raise CheckError(f"{place(recipe, step)}: {failed.message}", hint=failed.hint)
        if result.get("ok") is False:
            raise CheckError(f"{place(recipe, step)}: {result['problems'][0]}", hint="See `moeconv verify`.")
    done = summary(recipe, rows, warnings, dry_run=False)
    if (saved := save_recipe(recipe)) is not None:
        done["saved"] = saved
    if recipe.report is not None:
        done["report"] = _write_report(recipe, recipe.report, done)
    return done


def _row(recipe: Recipe, step: Step, result: JsonObject, meter: Meter, *, seconds: float) -> StepRow:
    """The row of a step that has been run, with the recipe's evaluation of what it wrote."""
    if step.command not in WRITERS:
        return row_of_measurement(step.name, result, seconds=seconds)
    if _is_one_file(result):  # neither transformers nor moeconv can open it
        return row_of_sizes(step.name, result["parameters"], result["bytes"], seconds=seconds)
    assert step.to is not None
    evaluation = _evaluation(recipe, step.to, meter)
    return row_of_model(step.name, open_model(step.to), seconds=seconds, evaluation=evaluation)


def _fused_row(step: Step, then: Step, result: JsonObject, *, kept: bool) -> StepRow:
    """The row of a prune whose model was never written."""
    row = row_of_sizes(step.name, result["between"], result["between"]["bytes"], seconds=0.0)
    row["output"], row["fused_into"], row["kept"] = None, then.to, kept
    row["result"] = {"command": "prune", "prune": result["prune"]}
    return row


def _write_report(recipe: Recipe, path: str, done: Ran) -> str:
    """Write the page about the last model that is no GGUF file: its sizes compared with the source, the result of every
    step, and the last statistics."""
    from moeconv.calibrate.artifact import is_statistics

    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    made = [step.to for step in recipe.steps if step.command == "calibrate" and step.to is not None]
    statistics = [file for file in made if is_statistics(file)]
    of_models = [row for row in done["steps"][1:] if "bytes" in row and not _is_one_file(row["result"])]
    models = [row["output"] for row in of_models if row["output"] is not None]
    first = first_checkpoint(recipe)
    report(
        models[-1] if models else first, path, results=[done], stats=statistics[-1] if statistics else None,
        reference=first, title=recipe.name, overwrite=True,
    )  # fmt: skip
    return path


def _is_one_file(result: JsonObject) -> bool:
    """Whether a step wrote a format that is a single file (GGUF)."""
    name = result.get("quantize", {}).get("format")
    return name is not None and FORMATS[name].shard is not None


def _evaluation(recipe: Recipe, path: str, meter: Meter) -> JsonObject:
    """The recipe's evaluation of one model. The comparison is left out for the reference itself, and for models that
    come before the step that makes the reference."""
    if recipe.evaluate is None:
        return {}
    parameters = dict(recipe.evaluate)
    others = [step.to for step in recipe.steps if step.to != path]
    reference = parameters.get("reference", "")
    if reference == path or (reference in others and not os.path.exists(reference)):
        parameters = {k: v for k, v in parameters.items() if not k.startswith(("max_", "min_")) and k != "reference"}
    request = asked("evaluate", parameters, path)
    assert isinstance(request, EvaluateRequest)
    result = run_request(request, meter)
    if (failed := failure(result)) is not None:
        raise CheckError(f"{escape(path)}: {failed.message}", hint=failed.hint)
    return result


def _run_or_keep(step: Step, meter: Meter) -> tuple[JsonObject, bool]:
    """(result, whether it is that of an earlier run). A step runs only if something that decides its output has
    changed."""
    request = step.asked
    if step.command in READERS:
        return run_request(request, meter), False
    assert step.to is not None
    return kept_or_run(step.to, key_of(step), lambda: run_request(request, meter))


def run_step(command: str, parameters: Config, *paths: str, meter: Meter) -> JsonObject:
    """Run one step without a recipe, and return its JSON. `paths` are the one that it reads and the one that it
    writes."""
    return run_request(asked(command, parameters, *paths), meter)


def _run_fused(step: Step, then: Step, meter: Meter) -> tuple[JsonObject, bool]:
    """A prune and the quantize after it in one pass. The options for writing of both steps apply; if both have the same
    option, the one of the quantize is used."""
    assert then.to is not None
    written = {name: v for s in (step, then) for name, v in s.parameters.items() if name in _WRITE}
    first = asked("prune", dict(step.parameters) | written, step.source, then.to)
    second = asked("quantize", dict(then.parameters) | written, step.to, then.to)
    assert isinstance(first, PruneRequest) and isinstance(second, QuantizeRequest)
    return kept_or_run(
        then.to, key_of_fused(step, then), lambda: timed(second, lambda: prune_and_quantize(first, second, meter=meter))
    )
