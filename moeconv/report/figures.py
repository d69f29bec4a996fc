"""The figures of a report, as plain JSON values: from headers and manifest, statistics, and results of steps.

What is not there is left out: a report shows what was measured and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moeconv.calibrate.artifact import Statistics
from moeconv.checkpoint.strictjson import read_json_object
from moeconv.errors import InputError, escape
from moeconv.families.model import Model
from moeconv.inspect.run import inspect
from moeconv.report.history import command_line, steps_of

_SIMILARITIES = ("output_cosine", "router_cosine", "logit_correlation")


def gather(
    model: Model,
    *,
    statistics: Statistics | None = None,
    results: Sequence[Mapping[str, Any]] = (),
    reference: Model | None = None,
) -> dict[str, Any]:
    """Everything that a report of `model` can show. `results` are JSON objects that moeconv's commands printed.

    Raises InputError for statistics of a model that is neither this one nor one that it was made from.
    """
    done = flatten(results)
    figures: dict[str, Any] = {
        "model": inspect(model),
        "reference": inspect(reference) if reference is not None else None,
        "history": [_step(step) for step in steps_of(model.checkpoint.manifest)],
        "pipeline": _pipeline(results),
        "evaluations": [_evaluation(r) for r in done if "perplexity" in r and "tokens_per_second" in r],
        "equivalence": _mapping(_last(done, "upcycle", "equivalence")),
        "quantization_error": _quantization(_mapping(_last(done, "quantize", "error"))),
        "tuning": _tuning(done),
        "pruning": _pruning(done),
        "curve": next((rows for r in reversed(done) if (rows := _rows(r.get("curve")))), []),
        "warnings": sorted({escape(text) for r in (*results, *done) for text in _texts(r.get("warnings"))}),
    }
    if statistics is not None:
        figures |= _measured(model, statistics)
    return figures


def load_results(path: str) -> dict[str, Any]:
    """A file that holds the JSON object of a moeconv command. Raises InputError for anything else."""
    value = read_json_object(Path(path), what=escape(path))
    if "error" in value and "command" not in value:
        raise InputError(f"{escape(path)} holds the error of a step that failed", hint="Run that step again.")
    return value


def flatten(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The results of single steps: those given, and those inside the results of recipes."""
    flat: list[Mapping[str, Any]] = []
    for result in results:
        if isinstance(result.get("steps"), list):
            flat += [inner for row in _rows(result["steps"]) if (inner := _mapping(row.get("result")))]
        else:
            flat.append(result)
    return flat


def _step(step: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "command": command_line(step),
        "total": _number(step.get("total_parameters")),
        "active": _number(step.get("active_parameters")),
        "changed": ", ".join(f"{escape(n)} {escape(role)}" for role, n in _mapping(step.get("changed")).items()),
        "plan_id": escape(step.get("plan_id", ""))[:12],
        "source": escape(step.get("source", ""))[:12],
        "version": escape(step.get("moeconv", "")),
    }


def _pipeline(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The table of the last recipe that was run: one row per step, with losses where the recipe measures them."""
    rows: list[dict[str, Any]] = []
    for result in results:
        if isinstance(result.get("steps"), list):
            rows = [
                {"step": escape(r.get("step", "")), **{k: _number(r.get(k)) for k in
                 ("total", "active", "bytes", "loss", "kl", "seconds")}}
                for r in _rows(result["steps"])
            ]  # fmt: skip
    return rows


def _evaluation(result: Mapping[str, Any]) -> dict[str, Any]:
    reference = _mapping(result.get("reference"))
    return {
        "loss": _number(result.get("loss")),
        "perplexity": _number(result.get("perplexity")),
        "reference_loss": _number(reference.get("loss")),
        "kl": _number(result.get("kl")),
        "agreement": _number(result.get("top1_agreement")),
        "tokens": _number(result.get("tokens")),
        "sources": [
            {"name": escape(s.get("name", "")), **{k: _number(s.get(k)) for k in
             ("tokens", "loss", "reference_loss", "kl")}}
            for s in _rows(result.get("sources"))
        ],
        "gates": [
            {"name": escape(n), "value": _number(g.get("value")), "limit": _number(g.get("limit")),
             "passed": g.get("passed") is True}
            for n, g in _mapping(result.get("gates")).items() if isinstance(g, Mapping)
        ],
    }  # fmt: skip


def _quantization(error: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a layer: how far the packed weights are from the source's and, by gptq, what the layer's outputs lose."""
    outputs = {str(r.get("layer")): r for r in _rows(_mapping(error.get("output")).get("layers"))}
    made = []
    for row in _rows(error.get("layers")):
        found = outputs.get(str(row.get("layer")), {})
        made.append({"layer": _number(row.get("layer")), "relative_rms": _number(row.get("relative_rms")),
                     "output_rms": _number(found.get("output_rms")),
                     "output_rms_rtn": _number(found.get("output_rms_rtn"))})  # fmt: skip
    return made


def _tuning(done: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    block = _block(done, "tune")
    if block is None:
        return None
    layers = [
        {"layer": _number(r.get("layer")), "after": _balance(r), "before": _balance(_mapping(r.get("before")))}
        for r in _rows(block.get("layers"))
    ]  # fmt: skip
    names = [f"{name}_{when}" for name in ("loss", "kl", "error") for when in ("before", "after")]
    words = {name: _number(block.get(name)) for name in names}
    return {"objective": escape(block.get("objective", "")), "steps": _number(block.get("steps")), **words,
            "layers": layers}  # fmt: skip


def _balance(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _number(row.get(key)) for key in ("entropy", "max_over_mean", "dead")}


def _pruning(done: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Per layer every expert's score, and whether it stayed."""
    block = _block(done, "prune")
    if block is None or not isinstance(block.get("keep"), Mapping):
        return None
    layers = []
    for layer, kept in block["keep"].items():
        listed = _mapping(block.get("scores")).get(layer)
        values = [_number(v) for v in listed] if isinstance(listed, list) else []
        stays = [e for e in kept if isinstance(e, int)] if isinstance(kept, list) else []
        layers.append({"layer": escape(layer), "scores": values, "kept": sorted(stays)})
    return {"criterion": escape(block.get("criterion", "")), "before": _number(block.get("experts_before")),
            "after": _number(block.get("experts_after")), "layers": layers}  # fmt: skip


def _measured(model: Model, statistics: Statistics) -> dict[str, Any]:
    """Utilization, entropy and similarities from a statistics file."""
    identity = statistics.metadata["identity"]
    earlier = [step.get("source") for step in steps_of(model.checkpoint.manifest)]
    if identity != model.identity and identity not in earlier:
        statistics.check_belongs(model)
    experts, names = statistics.metadata["num_experts"], [s.get("name") for s in statistics.metadata["sources"]]
    rows, similarity = [], []
    for layer in statistics.layers:
        count = statistics.layer(layer, "count")
        total = count.sum()
        tokens = float(statistics.layer(layer, "tokens").sum())
        entropy = float(statistics.layer(layer, "entropy_sum").sum()) / tokens if tokens else 0.0
        share = count.sum(axis=0) / total if total else count.sum(axis=0)
        rows.append({
            "layer": layer, "load": share.tolist(), "by_source": (count / np.maximum(count.sum(1, keepdims=True), 1))
            .tolist(), "entropy": entropy, "entropy_share": entropy / math.log(experts) if experts > 1 else 1.0,
            "max_over_mean": float(share.max() * experts) if total else 0.0, "dead": int((share == 0).sum()),
        })  # fmt: skip
        fields = {name: statistics.layer(layer, name) for name in _SIMILARITIES}
        similarity.append({
            "layer": layer, **{name: np.nan_to_num(values).tolist() for name, values in fields.items()},
            "dendrogram": dendrogram(fields["output_cosine"]),
        })  # fmt: skip
    return {
        "statistics": {
            "of_this_model": identity == model.identity, "num_experts": experts,
            "tokens": statistics.metadata["tokens"], "sources": [escape(name) for name in names],
        },
        "utilization": rows,
        "similarity": similarity,
    }  # fmt: skip


def dendrogram(cosine: np.ndarray) -> dict[str, Any] | None:
    """Average-linkage tree of experts at distance 1 - cosine [E, E]: the leaves' order, and each join's x and y.

    A join is ([x0, x1, x2, x3], [y0, y1, y2, y3]), x in leaves from 0, y in distance. None for fewer than two experts.
    """
    count = len(cosine)
    if count < 2:
        return None
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import squareform

    distance = np.clip(1.0 - np.nan_to_num((cosine + cosine.T) / 2), 0.0, 2.0)
    np.fill_diagonal(distance, 0.0)
    tree = hierarchy.dendrogram(hierarchy.linkage(squareform(distance, checks=False), "average"), no_plot=True)
    joins = [
        ([(x - 5) / 10 for x in xs], [float(y) for y in ys]) for xs, ys in zip(tree["icoord"], tree["dcoord"])
    ]  # scipy puts leaf i at 5 + 10 i
    return {"order": [int(i) for i in tree["leaves"]], "joins": joins}


def _block(done: Sequence[Mapping[str, Any]], command: str) -> Mapping[str, Any] | None:
    blocks = [r[command] for r in done if isinstance(r.get(command), Mapping)]
    return blocks[-1] if blocks else None


def _last(done: Sequence[Mapping[str, Any]], command: str, key: str) -> Any:
    """The newest value of a key of a command's blocks."""
    found = [r[command][key] for r in done if isinstance(r.get(command), Mapping) and r[command].get(key)]
    return found[-1] if found else None


def _rows(value: Any) -> list[Mapping[str, Any]]:
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> float | int | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if good else None


def _texts(value: Any) -> list[str]:
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []
