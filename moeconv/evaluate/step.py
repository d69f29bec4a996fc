"""The step evaluate."""

from __future__ import annotations

from typing import Any

from moeconv.checkpoint.hub import resolve
from moeconv.plan.meter import Meter
from moeconv.requests import EvaluateRequest, keywords


def evaluate(request: EvaluateRequest, *, meter: Meter) -> dict[str, Any]:
    """Loss on data, alone or against a reference, with gates."""
    from moeconv.evaluate.run import evaluate as measure

    asked = keywords(request.evaluate, request.data, request.measure)
    if request.evaluate.reference:
        asked["reference"] = resolve(request.evaluate.reference)
    return measure(resolve(request.model), seed=request.sample.seed, meter=meter, **asked)
