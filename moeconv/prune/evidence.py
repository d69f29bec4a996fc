"""What a prune is decided on: statistics from a file or calibrated now, and what a criterion reads from the weights."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moeconv.checkpoint.staging import Measured
from moeconv.checkpoint.writer import replace_file
from moeconv.families.model import Model
from moeconv.families.rule import rule_of
from moeconv.options import PruneOptions, parameters_of
from moeconv.plan.execute import default_jobs
from moeconv.plan.meter import Meter, SilentMeter
from moeconv.prune import choice
from moeconv.prune.criteria import CRITERIA, OF_WEIGHTS, Evidence
from moeconv.requests import PruneRequest

_STATISTICS, _ARRAYS = "statistics.safetensors", "arrays.npz"
JUDGE_EVERY = 4  # of --data, the share of windows that judge what was decided on the others


def gathered(model: Model, request: PruneRequest, measured: Measured, *, left: int | None, meter: Meter) -> Evidence:
    """Everything that the criterion needs to leave `left` experts (None: it decides how many), calibrated or read;
    `measured` keeps it. The request names its criterion."""
    options, data = request.prune, request.data.data
    path = options.stats
    if left == model.num_experts:  # only top-k changes
        return Evidence(rule=rule_of(model), num_experts=model.num_experts)
    if data and path is None and (CRITERIA[str(options.criterion)].needs.data or options.merge or covers(options)):
        from moeconv.calibrate.run import calibrate

        judges = options.max_loss_increase is not None or options.curve or options.top_k is not None
        judged = JUDGE_EVERY if judges else None
        asked = parameters_of(request.data, request.measure, request.calibrate)

        def measure(folder: Path) -> None:
            calibrate(
                str(model.checkpoint.path), folder / _STATISTICS, seed=request.plan.seed, judge_every=judged,
                overwrite=True, meter=meter, **asked,
            )  # fmt: skip

        path = str(measured.once("statistics", measure, resumes=True)[0] / _STATISTICS)
    return evidence_of(model, path, request, measured=measured, meter=meter)


def covers(options: PruneOptions) -> bool:
    """Whether experts are protected by how much text they cover."""
    return options.protect_coverage is not None


def evidence_of(
    model: Model, path: str | None, request: PruneRequest, *, measured: Measured | None = None,
    meter: Meter | None = None,
) -> Evidence:  # fmt: skip
    """Statistics from a file and, unless nothing is `measured` (a dry run), what the criterion reads from the
    weights."""
    evidence = Evidence(
        statistics=statistics_of(model, path, twin=request.statistics.stats_of_twin) if path else None,
        rule=rule_of(model),
        similarity=request.prune.similarity, seed=request.plan.seed, num_experts=model.num_experts,
    )  # fmt: skip
    if measured is None:
        return evidence
    workers = request.write.jobs or default_jobs()
    from moeconv.calibrate import weights

    chosen = CRITERIA[str(request.prune.criterion)]
    if (measure := chosen.needs.weights) is not None:
        (meter or SilentMeter()).note("reading the experts' weights")
        scores = _by_layer(
            measured, f"weights.{chosen.name}", lambda: weights.measure_experts(model, measure, jobs=workers)
        )
        evidence = replace(evidence, weights=scores)
    if (chosen.needs.similarity or request.prune.merge) and evidence.similarity in OF_WEIGHTS:
        (meter or SilentMeter()).note("comparing the experts' weights")
        aligned = evidence.similarity == "aligned"
        cosine = _by_layer(measured, "cosine", lambda: weights.weight_cosine(model, aligned=aligned, jobs=workers))
        evidence = replace(evidence, weight_cosine=cosine)
    return evidence


def _by_layer(
    measured: Measured, name: str, make: Callable[[], Mapping[int, np.ndarray]]
) -> dict[int, np.ndarray]:  # fmt: skip
    """What `make` reads from all weights, {layer: array}, read by one part for all."""

    def write(folder: Path) -> None:
        arrays: dict[str, Any] = {str(layer): array for layer, array in make().items()}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        replace_file(folder / _ARRAYS, buffer.getvalue())

    with np.load(measured.once(name, write)[0] / _ARRAYS, allow_pickle=False) as arrays:
        return {int(layer): arrays[layer] for layer in arrays.files}


def statistics_of(model: Model, path: str, *, twin: bool = False) -> Any:
    """Statistics that belong to the model, or with `twin` to its twin. Raises InputError for others."""
    from moeconv.calibrate.artifact import load_statistics

    statistics = load_statistics(path)
    statistics.check_belongs(model, twin=twin)
    return statistics


def settled(model: Model, evidence: Evidence, request: PruneRequest, *, named: bool) -> tuple[PruneRequest, list[str]]:
    """The request with the default criterion that the evidence allows, unless the user `named` one; a warning where it
    is the second best."""
    if named or evidence.statistics is None:
        return request, []
    criterion = choice.default_criterion(model, evidence)
    request = replace(request, prune=replace(request.prune, criterion=criterion))
    if criterion == choice.DEFAULT:
        return request, []
    return request, [
        "the statistics hold no token sample (an older file, or a routing rule that is not known): by saliency"
    ]
