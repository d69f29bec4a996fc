"""The step `evaluate`: the memory that it will take (a dry run), or the measurement."""

from __future__ import annotations

import math

from moeconv.checkpoint.hub import resolve
from moeconv.data.tasks import read_tasks, sizes_of
from moeconv.data.windows import sequence_length
from moeconv.evaluate.gates import check_sources
from moeconv.options import EVALUATE_SEQ_LEN, TOKENS, parameters_of
from moeconv.plan.meter import Meter
from moeconv.requests import EvaluateRequest
from moeconv.runner.run import open_resolved, planned_memory
from moeconv.stream.need import Workload, need_of, together
from moeconv.types import JsonObject

_BYTES_PER_TOKEN = 3  # of English text a little less than four


def evaluate(request: EvaluateRequest, *, meter: Meter) -> JsonObject:
    """Measure the loss on data and the accuracy on tasks, alone or against a reference, with gates."""
    if request.dry.dry_run:
        return _dry_run(request)
    from moeconv.evaluate.run import evaluate as measure

    asked = parameters_of(request.evaluate, request.data, request.measure)
    if request.evaluate.reference:
        asked["reference"] = resolve(request.evaluate.reference)
    return dict(measure(resolve(request.model), seed=request.sample.seed, meter=meter, **asked))


def _dry_run(request: EvaluateRequest) -> JsonObject:
    """The memory that the command will take. Without --tokens the command uses all the data, which a dry run does not
    read; the estimate is then for as many tokens as `calibrate` takes. Request files are read, and their tokens are
    estimated from their bytes."""
    paths = (request.model, request.evaluate.reference)
    models = [open_resolved(path) for path in paths if path is not None]
    asked, options = request.measure, request.evaluate
    given = [name for name, values in (("data", request.data.data), ("tasks", options.tasks)) if values] or ["data"]
    check_sources(given, questions=options.questions, tokens=asked.tokens, batch_size=asked.batch_size)
    length = min(sequence_length(model, asked.seq_len, default=EVALUATE_SEQ_LEN) for model in models)
    run = Workload(asked.tokens or TOKENS, length, asked.batch_size, flows=len(models), judged=True)
    runs = [run] if request.data.data else []
    if request.evaluate.tasks:
        sizes = sizes_of(read_tasks(request.evaluate.tasks, limit=request.evaluate.questions))
        total, longest = (math.ceil(n / _BYTES_PER_TOKEN) for n in (sum(sizes), max(sizes)))
        positions = min(sequence_length(model, asked.seq_len, default=longest) for model in models)
        runs.append(Workload(total, min(longest, positions), asked.batch_size, judged=True))
    run = max(runs or [run], key=lambda each: each.tokens)
    need = together([need_of(model, each) for model in models for each in runs or [run]])
    return {"command": "evaluate", "dry_run": True} | planned_memory(need, run, asked)
