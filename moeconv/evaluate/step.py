"""The step evaluate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeconv.checkpoint.hub import resolve
from moeconv.options import DataOptions, EvaluateOptions, MeasureOptions, PlanOptions, parameters_of, take
from moeconv.plan.meter import Meter


def evaluate(source: str, values: Mapping[str, Any], *, meter: Meter) -> dict[str, Any]:
    """Loss on data, alone or against a reference, with gates."""
    from moeconv.evaluate.run import evaluate as measure

    options = take(EvaluateOptions, values)
    named = parameters_of(options, take(DataOptions, values), take(MeasureOptions, values))
    if options.reference:
        named["reference"] = resolve(options.reference)
    return measure(resolve(source), seed=take(PlanOptions, values).seed, meter=meter, **named)
