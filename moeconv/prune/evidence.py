"""The evidence for a prune: statistics from a file or from a calibration, and measures of the weights."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moeconv.checkpoint.staging import Measured
from moeconv.checkpoint.writer import replace_file
from moeconv.families.model import Model
from moeconv.families.rule import Rule, rule_of
from moeconv.options import PruneOptions, parameters_of
from moeconv.plan.execute import default_jobs
from moeconv.plan.meter import Meter, SilentMeter
from moeconv.prune import choice
from moeconv.prune.criteria import CRITERIA, OF_WEIGHTS, Evidence
from moeconv.requests import PruneRequest
from moeconv.world import announce

if TYPE_CHECKING:
    from moeconv.calibrate.artifact import Statistics

_STATISTICS, _ARRAYS = "statistics.safetensors", "arrays.npz"
CALIBRATE = "calibrate"  # the work that several processes share
HELD_OUT_EVERY = 4  # every fourth window of --data is held out, and measures what was decided on the others


def gathered(model: Model, request: PruneRequest, measured: Measured, *, left: int | None, meter: Meter) -> Evidence:
    """Everything that the criterion of the request needs to keep `left` experts (None: the evidence decides how many).
    It is read from a file or calibrated; `measured` keeps it for an interrupted run."""
    options, data = request.prune, request.data.data
    path = options.stats
    if left == model.num_experts:  # only top-k or the width changes, so that no expert is chosen
        return Evidence(rule=_rule(model), num_experts=model.num_experts)
    if data and path is None and (CRITERIA[str(options.criterion)].needs.data or options.merge or covers(options)):

        def measure(folder: Path) -> None:
            announce(CALIBRATE, request, folder)
            calibrated(model, request, folder, meter=meter)

        path = str(measured.once("statistics", measure, resumes=True)[0] / _STATISTICS)
    return evidence_of(model, path, request, measured=measured, meter=meter)


def calibrated(model: Model, request: PruneRequest, folder: Path, *, meter: Meter) -> None:
    """Calibrate the model on --data, into a file in `folder`. Processes that share a command all call it."""
    from moeconv.calibrate.run import calibrate

    options = request.prune
    measures_loss = options.max_loss_increase is not None or options.curve or options.top_k is not None
    measures_loss = measures_loss or options.mix is not None
    calibrate(
        str(model.checkpoint.path), folder / _STATISTICS, seed=request.plan.seed,
        judge_every=HELD_OUT_EVERY if measures_loss else None, overwrite=True, meter=meter,
        **parameters_of(request.data, request.measure, request.calibrate),
    )  # fmt: skip


def _rule(model: Model) -> Rule | None:
    """The rule of the model's router; None for a dense model."""
    return rule_of(model) if model.num_experts else None


def covers(options: PruneOptions) -> bool:
    """Whether --protect-coverage is given."""
    return options.protect_coverage is not None


def evidence_of(
    model: Model, path: str | None, request: PruneRequest, *, measured: Measured | None = None,
    meter: Meter | None = None,
) -> Evidence:  # fmt: skip
    """The statistics of the file `path`, and the criterion's measures of the weights. Without `measured` (in a dry run)
    the weights are not read."""
    evidence = Evidence(
        statistics=statistics_of(model, path, twin=request.statistics.stats_of_twin) if path else None,
        rule=_rule(model),
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
    """{layer: array} that `make` computes from all weights. One part of a command computes it for all parts."""

    def write(folder: Path) -> None:
        arrays = {str(layer): array for layer, array in make().items()}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        replace_file(folder / _ARRAYS, buffer.getvalue())

    with np.load(measured.once(name, write)[0] / _ARRAYS, allow_pickle=False) as arrays:
        return {int(layer): arrays[layer] for layer in arrays.files}


def statistics_of(model: Model, path: str, *, twin: bool = False) -> Statistics:
    """The statistics of the model or, with `twin`, of its twin. Raises InputError for the statistics of another
    model."""
    from moeconv.calibrate.artifact import load_statistics

    statistics = load_statistics(path)
    statistics.check_belongs(model, twin=twin)
    return statistics


def with_criterion(
    model: Model, evidence: Evidence, request: PruneRequest, *, named: bool
) -> tuple[PruneRequest, list[str]]:
    """(the request with its criterion, warnings). Unless the user `named` a criterion, it is the best one that the
    statistics allow. There is a warning if they do not allow the best of all."""
    if named or evidence.statistics is None:
        return request, []
    criterion = choice.default_criterion(model, evidence)
    request = replace(request, prune=replace(request.prune, criterion=criterion))
    if criterion == choice.DEFAULT:
        return request, []
    return request, [
        "the statistics contain no token sample (the file is older, or the routing rule is not known): the criterion "
        "is saliency"
    ]
