"""The figures of a report, as plain JSON values: from headers and manifest, statistics, and results of steps.

A report shows what was measured and nothing else, so figures without a source are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from moeconv.calibrate.artifact import Statistics
from moeconv.checkpoint.strictjson import read_json_object
from moeconv.errors import InputError, escape
from moeconv.families.model import Model
from moeconv.inspect.run import inspect
from moeconv.report.history import command_line, steps_of
from moeconv.report.json_values import mapping, number, rows, texts
from moeconv.report.summary import about, curve_of, once, pipeline, verdict
from moeconv.report.types import (
    Balance,
    Dendrogram,
    ErrorRow,
    EvaluationFigures,
    Figures,
    HistoryRow,
    MixPoint,
    PruningFigures,
    PruningLayer,
    SimilarityRow,
    TaskRow,
    TuningFigures,
    TuningLayer,
    UtilizationRow,
)
from moeconv.types import JsonObject

_MOST_LEAVES = 32  # of a tree of experts; more cannot be told apart


def gather(
    model: Model,
    *,
    statistics: Statistics | None = None,
    results: Sequence[Mapping[str, object]] = (),
    reference: Model | None = None,
) -> Figures:
    """Everything that a report of `model` can show. `results` are JSON objects that moeconv's commands printed.

    Raises InputError for statistics of a model that is neither this one nor one that it was made from.
    """
    done = flatten(results)
    figures: Figures = {
        "model": inspect(model),
        "reference": inspect(reference) if reference is not None else None,
        "history": [_step(step) for step in steps_of(model.checkpoint.manifest)],
        "pipeline": pipeline(results),
        "evaluations": [_evaluation(r) for r in done if "perplexity" in r and "tokens_per_second" in r],
        "equivalence": mapping(_last(done, "upcycle", "equivalence")),
        "quantization_error": _quantization(mapping(_last(done, "quantize", "error"))),
        "tuning": _tuning(done),
        "pruning": _pruning(done),
        "curve": next((points for r in reversed(done) if (points := rows(r.get("curve")))), []),
        "curve_of": next((curve_of(r) for r in reversed(done) if rows(r.get("curve"))), None),
        "warnings": once(escape(text) for r in (*results, *done) for text in texts(r.get("warnings"))),
        "verdict": verdict(done),
        "about": about(model, reference, done),
    }
    if statistics is not None:
        _add_statistics(figures, model, statistics)
    return figures


def load_results(path: str) -> JsonObject:
    """A file that holds the JSON object of a moeconv command. Raises InputError for anything else."""
    value = read_json_object(Path(path), what=escape(path))
    if "error" in value and "command" not in value:
        raise InputError(f"{escape(path)} holds the error of a step that failed", hint="Run that step again.")
    return value


def flatten(results: Sequence[Mapping[str, object]]) -> list[Mapping[str, object]]:
    """The results of single steps: the given ones, and those inside the results of recipes."""
    flat: list[Mapping[str, object]] = []
    for result in results:
        if isinstance(result.get("steps"), list):
            flat += [inner for row in rows(result.get("steps")) if (inner := mapping(row.get("result")))]
        else:
            flat.append(result)
    return flat


def _step(step: Mapping[str, object]) -> HistoryRow:
    return {
        "command": command_line(step),
        "total": number(step.get("total_parameters")),
        "active": number(step.get("active_parameters")),
        "changed": ", ".join(f"{escape(n)} {escape(role)}" for role, n in mapping(step.get("changed")).items()),
        "plan_id": escape(step.get("plan_id", ""))[:12],
        "source": escape(step.get("source", ""))[:12],
        "version": escape(step.get("moeconv", "")),
    }


def _task_rows(task: Mapping[str, object]) -> list[TaskRow]:
    theirs = mapping(task.get("reference"))
    return [
        {
            "task": escape(task.get("name", "")),
            "metric": escape(metric),
            "questions": number(task.get("questions")),
            "value": number(mapping(figure).get("value")),
            "stderr": number(mapping(figure).get("stderr")),
            "reference": number(mapping(theirs.get(metric)).get("value")),
        }
        for metric, figure in mapping(task.get("metrics")).items()
    ]


def _evaluation(result: Mapping[str, object]) -> EvaluationFigures:
    reference = mapping(result.get("reference"))
    return {
        "loss": number(result.get("loss")),
        "perplexity": number(result.get("perplexity")),
        "reference_loss": number(reference.get("loss")),
        "kl": number(result.get("kl")),
        "agreement": number(result.get("top1_agreement")),
        "tokens": number(result.get("tokens")),
        "sources": [
            {"name": escape(s.get("name", "")), "tokens": number(s.get("tokens")), "loss": number(s.get("loss")),
             "reference_loss": number(s.get("reference_loss")), "kl": number(s.get("kl"))}
            for s in rows(result.get("sources"))
        ],
        "tasks": [row for task in rows(mapping(result.get("tasks")).get("results")) for row in _task_rows(task)],
        "gates": [
            {"name": escape(n), "value": number(g.get("value")), "limit": number(g.get("limit")),
             "passed": g.get("passed") is True}
            for n, g in mapping(result.get("gates")).items() if isinstance(g, Mapping)
        ],
    }  # fmt: skip


def _quantization(error: Mapping[str, object]) -> list[ErrorRow]:
    """One row per layer: the error of the packed weights and, with gptq, that of the layer's outputs."""
    outputs = {str(r.get("layer")): r for r in rows(mapping(error.get("output")).get("layers"))}
    made: list[ErrorRow] = []
    for row in rows(error.get("layers")):
        found = outputs.get(str(row.get("layer")), {})
        made.append({"layer": number(row.get("layer")), "relative_rms": number(row.get("relative_rms")),
                     "output_rms": number(found.get("output_rms")),
                     "output_rms_rtn": number(found.get("output_rms_rtn"))})  # fmt: skip
    return made


def _tuning(done: Sequence[Mapping[str, object]]) -> TuningFigures | None:
    block = _block(done, "tune")
    if block is None:
        return None
    layers: list[TuningLayer] = [
        {"layer": number(r.get("layer")), "after": _balance(r), "before": _balance(mapping(r.get("before")))}
        for r in rows(block.get("layers"))
    ]
    return {
        "objective": escape(block.get("objective", "")),
        "steps": number(block.get("steps")),
        "loss_before": number(block.get("loss_before")),
        "loss_after": number(block.get("loss_after")),
        "kl_before": number(block.get("kl_before")),
        "kl_after": number(block.get("kl_after")),
        "error_before": number(block.get("error_before")),
        "error_after": number(block.get("error_after")),
        "layers": layers,
    }


def _balance(row: Mapping[str, object]) -> Balance:
    return {
        "entropy": number(row.get("entropy")),
        "max_over_mean": number(row.get("max_over_mean")),
        "dead": number(row.get("dead")),
    }


def _pruning(done: Sequence[Mapping[str, object]]) -> PruningFigures | None:
    """The scores of all experts per layer, and which of them were kept."""
    block = _block(done, "prune")
    if block is None or not isinstance(keep := block.get("keep"), Mapping):
        return None
    layers: list[PruningLayer] = []
    for layer, kept in keep.items():
        listed = mapping(block.get("scores")).get(layer)
        values = [number(v) for v in listed] if isinstance(listed, list) else []
        stays = [e for e in kept if isinstance(e, int)] if isinstance(kept, list) else []
        layers.append({"layer": escape(layer), "scores": values, "kept": sorted(stays)})
    mix: list[MixPoint] = [
        {"experts": number(p.get("experts")), "width": number(p.get("width")),
         "loss_increase": number(p.get("loss_increase")), "chosen": p.get("chosen") is True}
        for p in rows(block.get("mix"))
    ]  # fmt: skip
    return {
        "criterion": escape(block.get("criterion") or ""),
        "before": number(block.get("experts_before")), "after": number(block.get("experts_after")),
        "width_before": number(block.get("width_before")), "width_after": number(block.get("width_after")),
        "shared_width_before": number(block.get("shared_width_before")),
        "shared_width_after": number(block.get("shared_width_after")),
        "mix": mix, "layers": layers,
    }  # fmt: skip


def _add_statistics(figures: Figures, model: Model, statistics: Statistics) -> None:
    """Add utilization, entropy and similarities from a statistics file to `figures`."""
    names = [escape(source.get("name")) for source in statistics.metadata["sources"]]
    figures["about"]["data"] = list(dict.fromkeys([*figures["about"]["data"], *names]))
    metadata = statistics.metadata
    identity = metadata["identity"]
    earlier = [step.get("source") for step in steps_of(model.checkpoint.manifest)]
    if identity != model.identity and identity not in earlier:
        statistics.check_belongs(model)
    experts = metadata["num_experts"]
    figures["statistics"] = {
        "of_this_model": identity == model.identity,
        "num_experts": experts,
        "tokens": metadata["tokens"],
        "sources": [escape(source.get("name")) for source in metadata["sources"]],
    }
    figures["utilization"] = [_utilization(statistics, layer, experts) for layer in statistics.layers]
    figures["similarity"] = [_similarity(statistics, layer) for layer in statistics.layers]


def _utilization(statistics: Statistics, layer: int, experts: int) -> UtilizationRow:
    count = statistics.layer(layer, "count")  # [sources, E]
    total = count.sum()
    tokens = float(statistics.layer(layer, "tokens").sum())
    entropy = float(statistics.layer(layer, "entropy_sum").sum()) / tokens if tokens else 0.0
    share = count.sum(axis=0) / total if total else count.sum(axis=0)
    return {
        "layer": layer,
        "load": share.tolist(),
        "by_source": (count / np.maximum(count.sum(1, keepdims=True), 1)).tolist(),
        "entropy": entropy,
        "entropy_share": entropy / math.log(experts) if experts > 1 else 1.0,
        "max_over_mean": float(share.max() * experts) if total else 0.0,
        "dead": int((share == 0).sum()),
    }


def _similarity(statistics: Statistics, layer: int) -> SimilarityRow:
    cosine = statistics.layer(layer, "output_cosine")

    def listed(name: str) -> list[list[float]]:
        values: list[list[float]] = np.nan_to_num(statistics.layer(layer, name)).tolist()
        return values

    return {
        "layer": layer,
        "output_cosine": listed("output_cosine"),
        "router_cosine": listed("router_cosine"),
        "logit_correlation": listed("logit_correlation"),
        "dendrogram": dendrogram(cosine),
    }


def dendrogram(cosine: np.ndarray) -> Dendrogram | None:
    """Average-linkage tree of experts at distance 1 - `cosine` [E, E]; None for fewer than two experts. Of more than
    `_MOST_LEAVES` experts, only the joins at the top."""
    count = len(cosine)
    if count < 2:
        return None
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import squareform

    distance = np.clip(1.0 - np.nan_to_num((cosine + cosine.T) / 2), 0.0, 2.0)
    np.fill_diagonal(distance, 0.0)
    cut = {"truncate_mode": "lastp", "p": _MOST_LEAVES} if count > _MOST_LEAVES else {}
    joined = hierarchy.linkage(squareform(distance, checks=False), "average")
    tree = hierarchy.dendrogram(joined, no_plot=True, **cut)
    joins = [
        ([(x - 5) / 10 for x in xs], [float(y) for y in ys]) for xs, ys in zip(tree["icoord"], tree["dcoord"])
    ]  # scipy puts leaf i at 5 + 10 i
    order: list[int | str] = [int(label) if label.isdigit() else label for label in tree["ivl"]]
    return {"order": order, "joins": joins}


def _block(done: Sequence[Mapping[str, object]], command: str) -> Mapping[str, object] | None:
    """The newest block of a command."""
    blocks = [block for r in done if isinstance(block := r.get(command), Mapping)]
    return blocks[-1] if blocks else None


def _last(done: Sequence[Mapping[str, object]], command: str, key: str) -> object:
    """The newest value that the blocks of a command have for a key."""
    found = [value for r in done if (value := mapping(r.get(command)).get(key))]
    return found[-1] if found else None
