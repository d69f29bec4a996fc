"""The JSON of `moeconv evaluate`."""

from __future__ import annotations

from typing import NotRequired

from typing_extensions import TypedDict

from moeconv.contract.calibrated import Load
from moeconv.contract.shared import Memory


class SourceLoss(TypedDict):
    """The loss on one source of data."""

    name: str
    tokens: int
    loss: float | None
    reference_loss: NotRequired[float | None]  # with --reference
    kl: NotRequired[float | None]


class Gate(TypedDict):
    """A limit, the measured value, and whether the value is within the limit. NaN is null, and does not pass."""

    limit: float
    value: float | None
    passed: bool


class Perplexity(TypedDict):
    """Loss in nats per token, and its exponential."""

    loss: float | None
    perplexity: float | None


class NotFinite(TypedDict):
    """A message that names the first layer and tensor that make the loss NaN or infinite."""

    message: str
    hint: str


class Figure(TypedDict):
    """A mean over questions and its standard error; null where it is NaN. For a single question, the error is null."""

    value: float | None
    stderr: float | None


class Comparison(TypedDict):
    """The mean difference from the reference on the same questions, its standard error, and the interval that contains
    95 % of the means of resampled questions (paired bootstrap)."""

    value: float | None
    stderr: float | None
    low: float | None
    high: float | None


class TaskResult(TypedDict):
    """What --tasks measured on one request file. `metrics` has accuracy, accuracy_per_char and accuracy_per_token of
    multiple choice, exact_match of short continuations, and bits_per_byte of the gold text."""

    name: str
    kind: str  # multiple_choice or continuation
    questions: int
    sha256: str
    metrics: dict[str, Figure]
    reference: NotRequired[dict[str, Figure]]  # with --reference
    change: NotRequired[dict[str, Comparison]]


class Tasks(TypedDict):
    """All request files. `accuracy` is the mean over them (accuracy of multiple choice, exact match of continuations),
    null if there is neither. `tokens` is the number of tokens that were run, `truncated` the number of choices whose
    context was truncated at its beginning."""

    results: list[TaskResult]
    accuracy: Figure | None
    reference_accuracy: NotRequired[Figure | None]  # with --reference
    accuracy_change: NotRequired[Comparison | None]
    choices: int
    tokens: int
    truncated: int
    tokens_per_second: float


class Evaluated(TypedDict):
    """What `moeconv evaluate` prints; a figure that is NaN or infinite is null."""

    path: str
    tokens: int
    loss: float | None
    perplexity: float | None
    sources: list[SourceLoss]
    reference: Perplexity | None
    kl: float | None
    top1_agreement: float | None
    seq_len: int
    memory: Memory | None
    tokens_per_second: float | None
    layers: list[Load]
    passed: bool
    gates: dict[str, Gate]
    not_finite: NotFinite | None
    seconds: NotRequired[float]
    phases: NotRequired[dict[str, float]]
    tasks: NotRequired[Tasks | None]  # with --tasks; null where a layer computes NaN
