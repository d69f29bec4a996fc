"""What a prune is decided on: statistics from a file or calibrated now, and what a criterion reads from the weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moeconv.families.model import Model
from moeconv.families.rule import rule_of
from moeconv.options import CalibrateOptions, DataOptions, MeasureOptions, PlanOptions, PruneOptions, WriteOptions, take
from moeconv.plan.execute import default_jobs
from moeconv.plan.meter import Meter, SilentMeter
from moeconv.prune import choice, limits
from moeconv.prune.criteria import CRITERIA, Evidence
from moeconv.steps.common import named

JUDGE_EVERY = 4  # of --data, the share of windows that judge what was decided on the others


def gathered(
    model: Model, values: Mapping[str, Any], parameters: Mapping[str, Any], folder: str, *, meter: Meter
) -> Evidence:
    """Everything that the criterion needs, calibrated or read."""
    options, data = take(PruneOptions, values), take(DataOptions, values).data
    path = options.stats
    if only_top_k(model, parameters):
        return Evidence(rule=rule_of(model), num_experts=model.num_experts)
    if data and path is None and (CRITERIA[parameters["criterion"]].needs_data or options.merge or covers(options)):
        from moeconv.calibrate.run import calibrate

        path = os.path.join(folder, "statistics.safetensors")
        judges = options.max_loss_increase is not None or options.curve or options.top_k is not None
        judged = JUDGE_EVERY if judges else None
        calibrate(
            str(model.checkpoint.path), path, seed=take(PlanOptions, values).seed, save_every=None, judge_every=judged,
            meter=meter, **named(values, DataOptions, MeasureOptions, CalibrateOptions),
        )  # fmt: skip
    jobs = take(WriteOptions, values).jobs or default_jobs()
    return evidence_of(model, path, parameters, jobs=jobs, meter=meter)


def only_top_k(model: Model, parameters: Mapping[str, Any]) -> bool:
    """Whether no expert goes."""
    return limits.check_prune(model, **parameters) == model.num_experts


def covers(options: PruneOptions) -> bool:
    return options.protect_coverage is not None


def evidence_of(
    model: Model, path: str | None, parameters: Mapping[str, Any], *, jobs: int | None, meter: Meter | None = None
) -> Evidence:
    """Statistics from a file and, unless `jobs` is None (a dry run), what the criterion reads from the weights."""
    evidence = Evidence(
        statistics=statistics_of(model, path) if path else None, rule=rule_of(model),
        similarity=parameters["similarity"], seed=parameters["seed"], num_experts=model.num_experts,
    )  # fmt: skip
    if jobs is None:
        return evidence
    from moeconv.calibrate import weights

    name = parameters["criterion"]
    alike = name == "redundancy" or parameters["merge"]
    if CRITERIA[name].needs == "weights":
        (meter or SilentMeter()).note("reading the experts' weights")
        evidence = replace(evidence, **{name: getattr(weights, name)(model, jobs=jobs)})
    if alike and evidence.similarity in ("aligned", "raw"):
        (meter or SilentMeter()).note("comparing the experts' weights")
        cosine = weights.weight_cosine(model, aligned=evidence.similarity == "aligned", jobs=jobs)
        evidence = replace(evidence, weight_cosine=cosine)
    return evidence


def statistics_of(model: Model, path: str) -> Any:
    """Statistics that belong to the model. Raises InputError for others."""
    from moeconv.calibrate.artifact import load_statistics

    statistics = load_statistics(path)
    statistics.check_belongs(model)
    return statistics


def settle(model: Model, evidence: Evidence, options: PruneOptions, parameters: dict[str, Any]) -> list[str]:
    """Put the default criterion that the evidence allows into `parameters`; a warning where it is the second best."""
    if options.criterion is not None or evidence.statistics is None:
        return []
    parameters["criterion"] = choice.default_criterion(model, evidence)
    if parameters["criterion"] == choice.DEFAULT:
        return []
    return ["the statistics hold no token sample (an older file, or a routing rule that is not known): by saliency"]
