"""The JSON of `moeconv tune`."""

from __future__ import annotations

from typing import NotRequired

from typing_extensions import TypedDict

from moeconv.contract.calibrated import Load
from moeconv.contract.shared import Written


class LoadBefore(TypedDict):
    """The routing of a layer before training."""

    load: list[float]
    entropy: float | None
    max_over_mean: float
    dead: int
    error: NotRequired[float]


class TunedLayer(Load):
    """The routing of a layer on held-out text, after and before training."""

    before: LoadBefore
    error: NotRequired[float]  # with the objective layerwise
    improved: NotRequired[bool]


class TunedTokens(TypedDict):
    """The number of tokens for training, and of held-out tokens for the measurement."""

    trained: int
    held_out: int


class TuneBlock(TypedDict):
    """The block of `moeconv tune`; losses are in nats per token, and null if the objective has none."""

    objective: str
    train: list[str]
    steps: int
    learning_rate: dict[str, float]
    loss_before: float | None
    loss_after: float | None
    kl_before: float | None
    kl_after: float | None
    error_before: NotRequired[float]  # with the objective layerwise
    error_after: NotRequired[float]
    improved: bool
    layers: list[TunedLayer]
    tokens: TunedTokens
    seconds: float


class Tuned(Written):
    """What `moeconv tune` prints."""

    tune: TuneBlock


class TunePlannedBlock(TypedDict):
    """What is known in a dry run, without any training."""

    objective: str
    steps: int


class TunePlanned(Written):
    """What `moeconv tune --dry-run` prints."""

    tune: TunePlannedBlock
