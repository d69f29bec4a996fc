"""The step evaluate."""

from __future__ import annotations

from typing import Any

from moeconv.checkpoint.hub import resolve
from moeconv.data.windows import sequence_length
from moeconv.options import EVALUATE_SEQ_LEN, TOKENS, parameters_of
from moeconv.plan.meter import Meter
from moeconv.requests import EvaluateRequest
from moeconv.runner.run import open_resolved, planned_memory
from moeconv.stream.need import Workload, need_of, together


def evaluate(request: EvaluateRequest, *, meter: Meter) -> dict[str, Any]:
    """Loss on data, alone or against a reference, with gates."""
    if request.dry.dry_run:
        return _foreseen(request)
    from moeconv.evaluate.run import evaluate as measure

    asked = parameters_of(request.evaluate, request.data, request.measure)
    if request.evaluate.reference:
        asked["reference"] = resolve(request.evaluate.reference)
    return measure(resolve(request.model), seed=request.sample.seed, meter=meter, **asked)


def _foreseen(request: EvaluateRequest) -> dict[str, Any]:
    """Without --tokens, which are all that the data has, for as many as calibrate takes."""
    paths = (request.model, request.evaluate.reference)
    models = [open_resolved(path) for path in paths if path is not None]
    asked = request.measure
    length = min(sequence_length(model, asked.seq_len, default=EVALUATE_SEQ_LEN) for model in models)
    run = Workload(asked.tokens or TOKENS, length, asked.batch_size, flows=len(models), judged=True)
    need = together([need_of(model, run) for model in models])
    return {"command": "evaluate", "dry_run": True} | planned_memory(need, run, asked)
