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
