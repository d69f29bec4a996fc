"""Running a recipe: each step reads what an earlier one wrote. Finished steps of an unchanged recipe are kept.

A ledger beside a step's output remembers what made it (parameters, inputs, version) and what it came to.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moeconv import __version__
from moeconv.calibrate.step import calibrate
from moeconv.checkpoint.paths import follow_links
from moeconv.checkpoint.reader import MANIFEST_NAME
from moeconv.checkpoint.strictjson import canonical_json, read_json_object
from moeconv.checkpoint.writer import replace_file
from moeconv.errors import CheckError, MoeconvError, escape
from moeconv.evaluate.gates import failure
from moeconv.evaluate.step import evaluate
from moeconv.families.model import Model, open_model
from moeconv.options import WriteOptions, reads_of
from moeconv.plan.build import count_params
from moeconv.plan.execute import companions_of, default_jobs
from moeconv.plan.memory import memory_bytes
from moeconv.plan.meter import Meter
from moeconv.plan.planned import planned_model
from moeconv.prune.step import prune
from moeconv.quantize.formats import FORMATS
from moeconv.quantize.step import quantize
from moeconv.recipe.fused import can_fuse, prune_and_quantize
from moeconv.recipe.guard import guard_recipe, read_by
from moeconv.recipe.planned import plan_of
from moeconv.recipe.read import GROUPS, Asked, Recipe, Step, asked, load_recipe
from moeconv.report.step import report
from moeconv.requests import (
    CalibrateRequest,
    EvaluateRequest,
    PruneRequest,
    QuantizeRequest,
    TuneRequest,
    UpcycleRequest,
)
from moeconv.runner.run import open_resolved
from moeconv.tune.step import tune
from moeconv.upcycle.step import upcycle

_LEDGER = ".moeconv-ledger.json"
_WRITE = frozenset(WriteOptions.__dataclass_fields__)
_WRITERS = ("upcycle", "tune", "prune", "quantize")


def run_recipe(
    path: str, *, meter: Meter, settings: tuple[str, ...] = (), dry_run: bool = False
) -> dict[str, Any]:  # fmt: skip
    """Run (or plan) every step of a recipe file. The JSON: output, and one row per step."""
    recipe = load_recipe(path, settings=settings)
    with follow_links(any(step.parameters.get("follow_links") for step in recipe.steps)):  # said once, of all it reads
        return plan_all(recipe) if dry_run else run_all(recipe, meter=meter)


def run_all(recipe: Recipe, *, meter: Meter) -> dict[str, Any]:
    """Run the steps in order; the first that fails ends the run with its error."""
    guard_recipe(recipe)
    rows: list[dict[str, Any]] = []
    warnings: list[str] = []
    first = open_resolved(recipe.steps[0].source)
    rows.append(_row("source", first, seconds=0.0, evaluation=_evaluation(recipe, recipe.steps[0].source, meter)))
    pending: Step | None = None  # a prune that the quantize behind it does too
    for at, step in enumerate(recipe.steps):
        meter.note(f"== {step.name}")
        began = time.monotonic()
        if pending is None and _fuses(recipe, at):
            pending = step
            continue
        result, kept = _one(step, meter) if pending is None else _fused(pending, step, meter)
        if pending is not None:
            rows.append(_between(pending, recipe.steps[at], result, kept=kept))
            pending = None
        seconds = time.monotonic() - began
        warnings += [f"{step.name}: {text}" for text in result.get("warnings", ())]
        if step.command in _WRITERS:
            assert step.to is not None
            if _is_one_file(result):  # transformers cannot open it, nor can we
                row = _planned_row(step.name, result["parameters"], result["bytes"], seconds=seconds)
            else:
                evaluation = _evaluation(recipe, step.to, meter)
                row = _row(step.name, open_model(step.to), seconds=seconds, evaluation=evaluation)
        else:
            row = {"step": step.name, "seconds": round(seconds, 3)}
            row |= {k: result[k] for k in ("loss", "kl", "passed") if k in result}
        rows.append(row | {"output": step.to, "kept": kept, "result": result})
        if result.get("passed") is False and (failed := failure(result)) is not None:
            raise CheckError(f"{step.name}: {failed.message}", hint=failed.hint)
    summary = _summary(recipe, rows, warnings, dry_run=False)
    if recipe.report is not None:
        summary["report"] = _report(recipe, summary)
    return summary


def _fuses(recipe: Recipe, at: int) -> bool:
    """Whether a step and the one behind it are a prune and a quantize that one pass can do: nothing is measured on what
    lies between them, nothing else reads it, and it is not there already."""
    step, then = recipe.steps[at], recipe.steps[at + 1] if at + 1 < len(recipe.steps) else None
    if then is None or (step.command, then.command) != ("prune", "quantize") or then.source != step.to:
        return False
    alone = [path for s in recipe.steps for _, path in read_by(s)].count(str(step.to)) == 1
    alone = alone and recipe.evaluate is None and not os.path.lexists(str(step.to))
    first, second = step.asked, then.asked
    assert isinstance(first, PruneRequest) and isinstance(second, QuantizeRequest)
    return alone and can_fuse(first, second)


def _between(step: Step, then: Step, result: Mapping[str, Any], *, kept: bool) -> dict[str, Any]:
    """The row of a prune whose model was never written."""
    row = _planned_row(step.name, result["between"], result["between"]["bytes"], seconds=0.0)
    block = {"command": "prune", "prune": result["prune"]}
    return row | {"output": None, "fused_into": then.to, "kept": kept, "result": block}


def _report(recipe: Recipe, summary: Mapping[str, Any]) -> str:
    """The page about the last model: sizes against the first, every step's result, the newest statistics."""
    assert recipe.report is not None
    from moeconv.calibrate.artifact import is_statistics

    os.makedirs(os.path.dirname(os.path.abspath(recipe.report)), exist_ok=True)
    made = [step.to for step in recipe.steps if step.command == "calibrate" and step.to is not None]
    statistics = [path for path in made if is_statistics(path)]
    report(
        summary["output"], recipe.report, results=[summary], stats=statistics[-1] if statistics else None,
        reference=recipe.steps[0].source, title=recipe.name, overwrite=True,
    )  # fmt: skip
    return recipe.report


def plan_all(recipe: Recipe) -> dict[str, Any]:
    """Every step's exact sizes, each planned on the plan of the one before it; nothing is read but headers."""
    guard_recipe(recipe)
    models: dict[str, Model] = {}
    rows: list[dict[str, Any]] = []
    warnings: list[str] = []
    unwritten = 0
    for at, step in enumerate(recipe.steps):
        source = models.get(step.source) or open_resolved(step.source)
        if not rows:
            rows.append(_row("source", source, seconds=0.0, evaluation={}))
        if step.command in _WRITERS:
            assert step.to is not None
            plan = plan_of(source, step.asked)
            if plan is not None and plan.gguf:
                parameters = {"total": plan.params_total, "active": plan.params_active}
                row = _planned_row(step.name, parameters, plan.nbytes, seconds=0.0)
            else:
                models[step.to] = source if plan is None else planned_model(
                    plan, companions=source.checkpoint.path, name=Path(step.to).name
                )  # fmt: skip
                row = _row(step.name, models[step.to], seconds=0.0, evaluation={})
            unwritten += row["bytes"] or 0 if _fuses(recipe, at) else 0
            jobs = step.parameters.get("jobs") or default_jobs()
            rows.append(row | {"output": step.to, "plan_id": None if plan is None else plan.plan_id,
                               "largest_item_bytes": None if plan is None else plan.largest_item,
                               "memory_bytes": None if plan is None else memory_bytes(plan, jobs=jobs)})  # fmt: skip
            said = [] if plan is None else list(plan.warnings)
            if plan is not None and step.source not in models:  # a source on disk: what lies beside its shards
                said += companions_of(plan, source.checkpoint).warnings
            warnings += [f"{step.name}: {text}" for text in said]
        else:
            rows.append({"step": step.name, "output": step.to, "seconds": 0.0})
    result = _summary(recipe, rows, warnings, dry_run=True)
    result["disk_bytes"] = sum(r.get("bytes") or 0 for r in rows[1:]) - unwritten
    result["disk_free_bytes"] = shutil.disk_usage(_existing(Path(os.path.abspath(result["output"])))).free
    return result


def _existing(path: Path) -> Path:
    """The path, or the closest directory above it that is there."""
    return next(p for p in (path, *path.parents) if p.is_dir())


def _summary(recipe: Recipe, rows: list[dict[str, Any]], warnings: list[str], *, dry_run: bool) -> dict[str, Any]:
    written = [s.to for s in recipe.steps if s.command in _WRITERS]
    return {
        "command": "run",
        "recipe": recipe.name,
        "dry_run": dry_run,
        "output": written[-1] if written else recipe.steps[-1].source,
        "steps": rows,
        "warnings": warnings,
    }


def _is_one_file(result: Mapping[str, Any]) -> bool:
    """Whether a step wrote a format that is a file of its own."""
    name = result.get("quantize", {}).get("format")
    return name is not None and FORMATS[name].shard is not None


def _row(name: str, model: Model, *, seconds: float, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    total, active = count_params(model)
    return {
        "step": name,
        "total": total,
        "active": active,
        "bytes": model.checkpoint.nbytes,
        "loss": evaluation.get("loss"),
        "kl": evaluation.get("kl"),
        "seconds": round(seconds, 3),
    }


def _planned_row(name: str, parameters: Mapping[str, int], nbytes: int, *, seconds: float) -> dict[str, Any]:
    """The row of an output that is no checkpoint (GGUF): nothing of it can be measured here."""
    return {
        "step": name, "total": parameters["total"], "active": parameters["active"], "bytes": nbytes, "loss": None,
        "kl": None, "seconds": round(seconds, 3),
    }  # fmt: skip


def _evaluation(recipe: Recipe, path: str, meter: Meter) -> dict[str, Any]:
    """The recipe's evaluation of one model, not compared with itself nor with what is not made yet."""
    if recipe.evaluate is None:
        return {}
    parameters = dict(recipe.evaluate)
    later = [step.to for step in recipe.steps if step.to != path]
    reference = parameters.get("reference", "")
    if reference == path or (reference in later and not os.path.exists(reference)):
        parameters = {k: v for k, v in parameters.items() if not k.startswith(("max_", "min_")) and k != "reference"}
    asks = asked("evaluate", parameters, path)
    assert isinstance(asks, EvaluateRequest)
    result = evaluate(asks, meter=meter)
    if (failed := failure(result)) is not None:
        raise CheckError(f"{escape(path)}: {failed.message}", hint=failed.hint)
    return result


def _one(step: Step, meter: Meter) -> tuple[dict[str, Any], bool]:
    """Run one step, or take its result from the ledger when nothing that made it has changed."""
    asks = step.asked
    if isinstance(asks, EvaluateRequest):
        return evaluate(asks, meter=meter), False
    return _remembered(step.to, _key(step), lambda: _run(asks, meter))


def run_step(command: str, parameters: Mapping[str, Any], *paths: str, meter: Meter) -> dict[str, Any]:
    """One step outside of a recipe: its JSON. `paths` are the one that it reads and the one that it writes."""
    return _run(asked(command, parameters, *paths), meter)


def _run(asks: Asked, meter: Meter) -> dict[str, Any]:
    match asks:
        case UpcycleRequest():
            return upcycle(asks, meter=meter)
        case TuneRequest():
            return tune(asks, meter=meter)
        case PruneRequest():
            return prune(asks, meter=meter)
        case QuantizeRequest():
            return quantize(asks, meter=meter)
        case CalibrateRequest():
            return calibrate(asks, meter=meter)
        case EvaluateRequest():
            return evaluate(asks, meter=meter)


def _fused(step: Step, then: Step, meter: Meter) -> tuple[dict[str, Any], bool]:
    """A prune and the quantize behind it in one pass, written as both say: where they differ, as the second does."""
    key = hashlib.sha256(canonical_json(json.loads(json.dumps([_key(step), then.command, dict(then.parameters)]))))
    written = {name: v for s in (step, then) for name, v in s.parameters.items() if name in _WRITE}
    first = asked("prune", dict(step.parameters) | written, step.source, then.to)
    second = asked("quantize", dict(then.parameters) | written, step.to, then.to)
    assert isinstance(first, PruneRequest) and isinstance(second, QuantizeRequest)
    return _remembered(then.to, key.hexdigest(), lambda: prune_and_quantize(first, second, meter=meter))


def _remembered(to: str | None, key: str, run: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], bool]:
    """What the ledger holds for `to` when `key` made it and it has not changed; else what running gives."""
    assert to is not None
    entry = _read_ledger(to).get(Path(to).name)
    if isinstance(entry, dict) and entry.get("key") == key and entry.get("came_to") == _came_to(to):
        return dict(entry["result"]), True
    os.makedirs(os.path.dirname(os.path.abspath(to)), exist_ok=True)
    result = run()
    ledger = _read_ledger(to) | {Path(to).name: {"key": key, "came_to": _came_to(to), "result": result}}
    replace_file(_ledger_path(to), json.dumps(ledger, default=str).encode())
    return result, False


def _key(step: Step) -> str:
    """What makes a step's output: command, parameters, version, and the bytes of its inputs."""
    groups = GROUPS[step.command]
    models = [step.source, *(path for _, path in reads_of(step.parameters, *groups, kinds=("model",)))]
    files = [path for kind in ("data", "file") for _, path in reads_of(step.parameters, *groups, kinds=(kind,))]
    inputs = [open_resolved(path).identity for path in models]
    state = [__version__, step.command, dict(step.parameters), inputs, [_file_state(f) for f in files]]
    return hashlib.sha256(canonical_json(json.loads(json.dumps(state)))).hexdigest()


def _file_state(path: str) -> list[Any]:
    try:
        status = os.stat(path)
    except OSError:
        return [path]
    return [path, status.st_size, status.st_mtime_ns]


def _came_to(path: str) -> str | None:
    """What stands at an output now: the manifest's hash for a model, size and time for a file."""
    try:
        if os.path.isdir(path):
            return hashlib.sha256((Path(path) / MANIFEST_NAME).read_bytes()).hexdigest()
        return json.dumps(_file_state(path)) if os.path.exists(path) else None
    except OSError:
        return None


def _ledger_path(output: str) -> Path:
    return Path(os.path.abspath(output)).parent / _LEDGER


def _read_ledger(output: str) -> dict[str, Any]:
    try:
        return read_json_object(_ledger_path(output), what=_LEDGER)
    except MoeconvError:
        return {}
