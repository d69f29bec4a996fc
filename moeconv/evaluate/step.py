"""The step `evaluate`: the memory that it will take (a dry run), or the measurement."""

from __future__ import annotations

from moeconv.checkpoint.hub import resolve
from moeconv.data.windows import sequence_length
from moeconv.options import EVALUATE_SEQ_LEN, TOKENS, parameters_of
from moeconv.plan.meter import Meter
from moeconv.requests import EvaluateRequest
from moeconv.runner.run import open_resolved, planned_memory
from moeconv.stream.need import Workload, need_of, together
from moeconv.types import JsonObject


def evaluate(request: EvaluateRequest, *, meter: Meter) -> JsonObject:
    """Measure the loss on data, alone or against a reference, with gates."""
    if request.dry.dry_run:
        return _dry_run(request)
    from moeconv.evaluate.run import evaluate as measure

    asked = parameters_of(request.evaluate, request.data, request.measure)
    if request.evaluate.reference:
        asked["reference"] = resolve(request.evaluate.reference)
    return dict(measure(resolve(request.model), seed=request.sample.seed, meter=meter, **asked))


def _dry_run(request: EvaluateRequest) -> JsonObject:
    """The memory that the command will take. Without --tokens the command uses all the data, which a dry run does not
    read; the estimate is then for as many tokens as `calibrate` takes."""
    paths = (request.model, request.evaluate.reference)
    models = [open_resolved(path) for path in paths if path is not None]
    asked = request.measure
    length = min(sequence_length(model, asked.seq_len, default=EVALUATE_SEQ_LEN) for model in models)
    run = Workload(asked.tokens or TOKENS, length, asked.batch_size, flows=len(models), judged=True)
    need = together([need_of(model, run) for model in models])
    return {"command": "evaluate", "dry_run": True} | planned_memory(need, run, asked)
