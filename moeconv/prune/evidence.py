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
from moeconv.options import (
    CalibrateOptions,
    DataOptions,
    MeasureOptions,
    PlanOptions,
    PruneOptions,
    StatisticsOptions,
    WriteOptions,
    take,
)
from moeconv.plan.execute import default_jobs
from moeconv.plan.meter import Meter, SilentMeter
from moeconv.prune import choice, limits
from moeconv.prune.criteria import CRITERIA, OF_WEIGHTS, Evidence
from moeconv.runner.run import named

_STATISTICS, _ARRAYS = "statistics.safetensors", "arrays.npz"
JUDGE_EVERY = 4  # of --data, the share of windows that judge what was decided on the others


def gathered(
    model: Model, values: Mapping[str, Any], parameters: Mapping[str, Any], measured: Measured, *, meter: Meter
) -> Evidence:
    """Everything that the criterion needs, calibrated or read; `measured` keeps it."""
    options, data = take(PruneOptions, values), take(DataOptions, values).data
    path = options.stats
    if only_top_k(model, parameters):
        return Evidence(rule=rule_of(model), num_experts=model.num_experts)
    if data and path is None and (CRITERIA[parameters["criterion"]].needs.data or options.merge or covers(options)):
        from moeconv.calibrate.run import calibrate

        judges = options.max_loss_increase is not None or options.curve or options.top_k is not None
        judged = JUDGE_EVERY if judges else None
        asked = named(values, DataOptions, MeasureOptions, CalibrateOptions)
        seed = take(PlanOptions, values).seed

        def measure(folder: Path) -> None:
            calibrate(
                str(model.checkpoint.path), folder / _STATISTICS, seed=seed, judge_every=judged, overwrite=True,
                meter=meter, **asked,
            )  # fmt: skip

        path = str(measured.once("statistics", measure, resumes=True)[0] / _STATISTICS)
    jobs = take(WriteOptions, values).jobs or default_jobs()
    twin = take(StatisticsOptions, values).stats_of_twin
    return evidence_of(model, path, parameters, twin=twin, jobs=jobs, measured=measured, meter=meter)


def only_top_k(model: Model, parameters: Mapping[str, Any]) -> bool:
    """Whether no expert goes."""
    return limits.check_prune(model, **parameters) == model.num_experts


def covers(options: PruneOptions) -> bool:
    """Whether experts are protected by how much text they cover."""
    return options.protect_coverage is not None


def evidence_of(
    model: Model, path: str | None, parameters: Mapping[str, Any], *, twin: bool = False, jobs: int | None = None,
    measured: Measured | None = None, meter: Meter | None = None,
) -> Evidence:  # fmt: skip
    """Statistics from a file and, unless nothing is `measured` (a dry run), what the criterion reads from the
    weights."""
    evidence = Evidence(
        statistics=statistics_of(model, path, twin=twin) if path else None, rule=rule_of(model),
        similarity=parameters["similarity"], seed=parameters["seed"], num_experts=model.num_experts,
    )  # fmt: skip
    if measured is None:
        return evidence
    workers = jobs or default_jobs()
    from moeconv.calibrate import weights

    chosen = CRITERIA[parameters["criterion"]]
    if (measure := chosen.needs.weights) is not None:
        (meter or SilentMeter()).note("reading the experts' weights")
        scores = _by_layer(
            measured, f"weights.{chosen.name}", lambda: weights.measure_experts(model, measure, jobs=workers)
        )
        evidence = replace(evidence, weights=scores)
    if (chosen.needs.similarity or parameters["merge"]) and evidence.similarity in OF_WEIGHTS:
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


def settle(model: Model, evidence: Evidence, options: PruneOptions, parameters: dict[str, Any]) -> list[str]:
    """Put the default criterion that the evidence allows into `parameters`; a warning where it is the second best."""
    if options.criterion is not None or evidence.statistics is None:
        return []
    parameters["criterion"] = choice.default_criterion(model, evidence)
    if parameters["criterion"] == choice.DEFAULT:
        return []
    return ["the statistics hold no token sample (an older file, or a routing rule that is not known): by saliency"]
