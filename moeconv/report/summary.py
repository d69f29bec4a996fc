"""The beginning of a report: the verdict, what the report is about, and the table of the steps with their losses."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from moeconv import __version__
from moeconv.checkpoint.reader import MANIFEST_NAME
from moeconv.errors import escape
from moeconv.families.model import Model
from moeconv.report.json_values import mapping, number, rows, texts
from moeconv.report.types import About, CurveFigures, PipelineRow, Verdict

_WRITERS = {"upcycle": "method", "tune": "objective", "prune": "criterion", "quantize": "scheme"}
_PACKAGES = ("torch", "transformers")


def verdict(done: Sequence[Mapping[str, object]]) -> Verdict:
    """The checks in the results of steps: the gates of evaluations, and what `verify` found."""
    checks = [check for result in done for check in _checks(result)]
    return {"checked": len(checks), "failed": [words for passed, words in checks if not passed]}


def _checks(result: Mapping[str, object]) -> Iterator[tuple[bool, str]]:
    """(passed, description) of every check in a result."""
    gates = mapping(result.get("gates"))
    for name, gate in gates.items():
        if isinstance(gate, Mapping):
            value, limit = number(gate.get("value")), number(gate.get("limit"))
            shown = "not a number" if value is None else f"{value:.4f}"
            yield gate.get("passed") is True, f"{escape(name)} is {shown}, the limit is {limit}"
    if result.get("passed") is False and all(mapping(gate).get("passed") for gate in gates.values()):
        yield False, escape(mapping(result.get("not_finite")).get("message", "an evaluation failed"))
    if isinstance(result.get("ok"), bool):
        problems = texts(result.get("problems"))
        yield result["ok"] is True, f"verify: {escape(problems[0])}" if problems else "verify"


def about(model: Model, reference: Model | None, done: Sequence[Mapping[str, object]]) -> About:
    """What the report is about. `data` has the names of the texts of all results."""
    manifest = Path(model.checkpoint.path) / MANIFEST_NAME
    written = manifest.stat().st_mtime if manifest.is_file() else None
    versions = {"moeconv": __version__}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    names = [escape(source.get("name", "")) for result in done for source in rows(result.get("sources"))]
    return {
        "path": escape(Path(model.checkpoint.path).name),
        "reference": None if reference is None else escape(Path(reference.checkpoint.path).name),
        "date": None if written is None else time.strftime("%Y-%m-%d", time.gmtime(written)),
        "versions": versions,
        "data": list(dict.fromkeys(filter(None, names))),
    }


def once(warnings: Iterable[str]) -> list[str]:
    """Every warning once: a recipe repeats those of its steps, after the name of the step."""
    found = sorted(set(warnings))
    return [text for text in found if not any(text.endswith(f": {other}") for other in found if other != text)]


def curve_of(result: Mapping[str, object]) -> CurveFigures:
    """What the curve in the result of a prune was measured with."""
    return {
        "criterion": escape(result.get("criterion", "")), "refit": result.get("refit") is True,
        "reference_loss": number(result.get("reference_loss")),
    }  # fmt: skip


def pipeline(results: Sequence[Mapping[str, object]]) -> list[PipelineRow]:
    """One row per step: those of the last recipe that was run or, without one, of the single results in their order."""
    recipes = [result for result in results if rows(result.get("steps"))]
    if recipes:
        return [_recipe_row(row) for row in rows(recipes[-1]["steps"])]
    made: list[PipelineRow] = []
    at: dict[str, PipelineRow] = {}  # by the path of what a step wrote
    for result in results:
        command = str(result.get("command", ""))
        if command in _WRITERS and mapping(result.get(command)):
            row = _written_row(command, result)
            at[str(result.get("output"))] = row
            made.append(row)
        elif "perplexity" in result and "path" in result:
            reference = number(mapping(result.get("reference")).get("loss"))
            if reference is not None and all(row["step"] != "reference" for row in made):
                made.insert(0, _row("reference", loss=reference))
            found = at.get(str(result["path"]))
            if found is None:
                found = _row(f"evaluate {escape(Path(str(result['path'])).name)}")
                made.append(found)
            found["loss"], found["kl"] = number(result.get("loss")), number(result.get("kl"))
    return made


def _row(step: str, *, loss: float | int | None = None) -> PipelineRow:
    return {
        "step": step, "total": None, "active": None, "bytes": None, "loss": loss, "kl": None, "seconds": None,
    }  # fmt: skip


def _written_row(command: str, result: Mapping[str, object]) -> PipelineRow:
    """The row of a step that wrote a checkpoint."""
    parameters = mapping(result.get("parameters"))
    word = escape(mapping(result.get(command)).get(_WRITERS[command]) or "")
    return {
        **_row(f"{command} {word}".strip()),
        "total": number(parameters.get("total")),
        "active": number(parameters.get("active")),
        "bytes": number(result.get("bytes")),
        "seconds": number(result.get("seconds")),
    }


def _recipe_row(row: Mapping[str, object]) -> PipelineRow:
    return {
        "step": escape(row.get("step", "")),
        "total": number(row.get("total")),
        "active": number(row.get("active")),
        "bytes": number(row.get("bytes")),
        "loss": number(row.get("loss")),
        "kl": number(row.get("kl")),
        "seconds": number(row.get("seconds")),
    }
