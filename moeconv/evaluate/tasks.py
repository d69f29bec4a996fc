"""`evaluate --tasks`: the questions of request files, answered by the model and its reference, one layer at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeconv.contract import Tasks
from moeconv.data.tasks import Task, read_tasks
from moeconv.data.tokenizer import load_tokenizer
from moeconv.data.windows import sequence_length
from moeconv.evaluate.accuracy import grade, mean_accuracy, mean_change, results_of
from moeconv.evaluate.answers import Answers, answers_of
from moeconv.evaluate.encode import Encoded, encode
from moeconv.evaluate.settings import PassSettings
from moeconv.families.model import Model
from moeconv.families.rope import table_of_length
from moeconv.stream.finite import NotFiniteError, not_finite
from moeconv.stream.layers import start_meter

_LONGEST = 4096  # tokens of an input where a model states no number of positions


@dataclass(frozen=True, eq=False)
class Questions:
    """The tasks, and all their choices as tokens."""

    tasks: list[Task]
    encoded: Encoded


def read_questions(
    paths: Sequence[str], models: Sequence[Model], seq_len: int | None, limit: int | None, settings: PassSettings
) -> Questions:
    """Read and tokenize the request files. Raises InputError for files that cannot be used; the message states the line
    number."""
    settings.meter.note("reading the tasks")
    tasks = read_tasks(paths, limit=limit)
    positions = [model.value("max_position_embeddings") or _LONGEST for model in models]
    longest = min(sequence_length(model, seq_len, default=n) for model, n in zip(models, positions))
    tokenizer = load_tokenizer(models[0].checkpoint.path)
    encoded = encode(
        tasks, tokenizer, longest=longest, batch_size=settings.batch_size,
        table=lambda length: tuple(table_of_length(model.value, length) for model in models),
    )  # fmt: skip
    return Questions(tasks, encoded)


def longest_of(asked: Questions | None) -> int:
    """The tokens of the longest input."""
    return 0 if asked is None else asked.encoded.inputs.longest


def answer_tasks(
    models: Sequence[Model], asked: Questions, settings: PassSettings, *, seed: int
) -> tuple[Tasks | None, NotFiniteError | None]:
    """(the JSON of --tasks, what made a log-probability NaN or infinite). `models` are the model and, if there is one,
    its reference."""
    start_meter(settings.meter, *models, tokens=asked.encoded.inputs.size)
    began = time.monotonic()
    answers: list[Answers] = []
    seconds = 0.0
    for model in models:
        stream = settings.stream(model, asked.encoded.inputs, flows=1)
        try:
            stream.run()
        except NotFiniteError as error:
            return None, error
        settings.meter.note("reading the answers")
        answers.append(answers_of(stream, asked.encoded))
        seconds = seconds or time.monotonic() - began
        if not np.isfinite(answers[-1].logs).all():
            return None, not_finite(model, None, dtype=stream.dtype)
        del stream  # its activations, before those of the next model
    mine, *rest = (grade(asked.tasks, asked.encoded, found) for found in answers)
    theirs = rest[0] if rest else None
    size = asked.encoded.inputs.size - asked.encoded.inputs.padding
    result: Tasks = {
        "results": results_of(mine, theirs, seed=seed),
        "accuracy": mean_accuracy(mine),
        "choices": len(asked.encoded.bounds) - 1,
        "tokens": size,
        "truncated": asked.encoded.truncated,
        "tokens_per_second": size / seconds,
    }
    if theirs is not None:
        result["reference_accuracy"] = mean_accuracy(theirs)
        result["accuracy_change"] = mean_change(mine, theirs, seed=seed)
    return result, None


def accuracy_figures(answered: Tasks | None) -> dict[str, float]:
    """The figures that the gates of --tasks limit; NaN where they were not measured."""
    mean = answered["accuracy"] if answered else None
    change = answered.get("accuracy_change") if answered else None
    value = mean["value"] if mean else None
    drop = change["value"] if change else None
    return {"accuracy": math.nan if value is None else value, "accuracy_drop": math.nan if drop is None else 0 - drop}
