"""Computes figures from the answers: accuracies, bits per byte, exact match, standard errors, paired bootstrap."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moeconv.contract import Comparison, Figure, TaskResult
from moeconv.data.tasks import Question, Task
from moeconv.evaluate.answers import Answers
from moeconv.evaluate.encode import Encoded
from moeconv.randomness import generator

_RESAMPLES = 2000
_DRAWS = 1 << 20  # questions drawn at a time
_FEW_TOKENS = 16  # no model is expected to reproduce a longer gold continuation exactly
_METRICS = ("accuracy", "accuracy_per_char", "accuracy_per_token", "exact_match", "bits_per_byte")


@dataclass(frozen=True, eq=False)
class Graded:
    """A task and its figures per question: metric -> float64 [questions]. `main` is the metric that gates limit; None
    where there is no accuracy."""

    task: Task
    values: Mapping[str, np.ndarray]

    @property
    def main(self) -> str | None:
        return next((name for name in ("accuracy", "exact_match") if name in self.values), None)


def grade(tasks: Sequence[Task], asked: Encoded, found: Answers) -> list[Graded]:
    """The figures of every question. The model picks the choice with the highest log-probability: as it is, per
    character (without spaces around the choice), or per token; in a tie, the first one, as in other harnesses.
    `bits_per_byte` is that of the gold text."""
    tokens = np.diff(asked.bounds)
    graded, at = list[Graded](), 0
    for task in tasks:
        rows: dict[str, list[float]] = {name: [] for name in _METRICS}
        for question in task.questions:
            part = slice(at, at + len(question.choices))
            at = part.stop
            _grade(
                rows, question, found.logs[part], tokens[part], greedy=bool(found.greedy[part.start + question.gold])
            )
        del rows["exact_match" if task.multiple_choice else "accuracy"]
        if not task.multiple_choice:
            del rows["accuracy_per_char"], rows["accuracy_per_token"]
            if int(tokens[at - len(task.questions) : at].max()) > _FEW_TOKENS:
                del rows["exact_match"]
        graded.append(Graded(task, {name: np.array(values) for name, values in rows.items()}))
    return graded


def _grade(
    rows: dict[str, list[float]], question: Question, logs: np.ndarray, tokens: np.ndarray, *, greedy: bool
) -> None:
    texts, gold = question.choices, question.gold
    scores = {
        "accuracy": logs,
        "accuracy_per_char": logs / [len(text.strip()) for text in texts],
        "accuracy_per_token": logs / tokens,
    }
    known = bool(np.isfinite(logs).all())
    for name, values in scores.items():
        rows[name].append(float(np.argmax(values) == gold) if known else math.nan)
    rows["exact_match"].append(float(greedy) if known else math.nan)
    rows["bits_per_byte"].append(-float(logs[gold]) / math.log(2) / len(texts[gold].encode()))


def results_of(graded: Sequence[Graded], others: Sequence[Graded] | None, *, seed: int) -> list[TaskResult]:
    """The JSON of every task; `others` are the figures of the reference."""
    results: list[TaskResult] = []
    for i, mine in enumerate(graded):
        row: TaskResult = {
            "name": mine.task.name,
            "kind": "multiple_choice" if mine.task.multiple_choice else "continuation",
            "questions": len(mine.task.questions),
            "sha256": mine.task.sha256,
            "metrics": {name: _figure(values) for name, values in mine.values.items()},
        }
        if others is not None:
            theirs = others[i].values
            row["reference"] = {name: _figure(values) for name, values in theirs.items()}
            names = list(mine.values)
            differences = np.stack([mine.values[name] - theirs[name] for name in names], axis=1)
            means = _resampled(differences, (seed, "bootstrap", i))
            row["change"] = {name: _compared(differences[:, k], means[:, k]) for k, name in enumerate(names)}
        results.append(row)
    return results


def mean_accuracy(graded: Sequence[Graded]) -> Figure | None:
    """The mean over the tasks that have an accuracy or exact match; None if there is none."""
    values = [mine.values[mine.main] for mine in graded if mine.main is not None]
    if not values:
        return None
    return _rounded(
        float(np.mean([v.mean() for v in values])), math.sqrt(sum(_error(v) ** 2 for v in values)) / len(values)
    )


def mean_change(graded: Sequence[Graded], others: Sequence[Graded], *, seed: int) -> Comparison | None:
    """The change of that mean against the reference; every task is resampled by itself."""
    pairs = [
        (i, mine.values[mine.main] - theirs.values[mine.main])
        for i, (mine, theirs) in enumerate(zip(graded, others, strict=True))
        if mine.main is not None
    ]
    if not pairs:
        return None
    means = np.mean([_resampled(d[:, None], (seed, "bootstrap", i))[:, 0] for i, d in pairs], axis=0)
    error = math.sqrt(sum(_error(d) ** 2 for _, d in pairs)) / len(pairs)
    return _interval(float(np.mean([d.mean() for _, d in pairs])), error, means)


def _resampled(values: np.ndarray, key: Sequence[object]) -> np.ndarray:
    """The means float64 [resamples, k] of `values` [questions, k] over questions drawn with replacement. All k columns
    use the same draws, and so do all calls with this key and number of questions."""
    random, count = generator(key), len(values)
    step = max(1, _DRAWS // count)
    means = [
        values[random.integers(0, count, (min(step, _RESAMPLES - start), count))].mean(axis=1)
        for start in range(0, _RESAMPLES, step)
    ]
    return np.concatenate(means)


def _compared(differences: np.ndarray, means: np.ndarray) -> Comparison:
    return _interval(float(differences.mean()), _error(differences), means)


def _interval(mean: float, error: float, means: np.ndarray) -> Comparison:
    low, high = (float(v) for v in np.quantile(means, (0.025, 0.975)))
    return {"value": _finite(mean), "stderr": _finite(error), "low": _finite(low), "high": _finite(high)}


def _figure(values: np.ndarray) -> Figure:
    return _rounded(float(values.mean()), _error(values))


def _rounded(value: float, error: float) -> Figure:
    return {"value": _finite(value), "stderr": _finite(error)}


def _error(values: np.ndarray) -> float:
    """The standard error of the mean; NaN for a single question."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
