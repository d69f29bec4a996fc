"""The JSON of `moeconv tune`."""

from __future__ import annotations

from typing_extensions import NotRequired, TypedDict

from moeconv.contract.calibrated import Load
from moeconv.contract.shared import Written


class LoadBefore(TypedDict):
    """A layer's routing before the training."""

    load: list[float]
    entropy: float | None
    max_over_mean: float
    dead: int
    error: NotRequired[float]


class TunedLayer(Load):
    """A layer's routing on held-out text after the training, and before."""

    before: LoadBefore
    error: NotRequired[float]  # of the objective layerwise
    improved: NotRequired[bool]


class TunedTokens(TypedDict):
    """The number of tokens that trained, and of held-out tokens."""

    trained: int
    held_out: int


class TuneBlock(TypedDict):
    """The block of `moeconv tune`; losses in nats per token, null where the objective has none."""

    objective: str
    train: list[str]
    steps: int
    learning_rate: dict[str, float]
    loss_before: float | None
    loss_after: float | None
    kl_before: float | None
    kl_after: float | None
    error_before: NotRequired[float]  # of the objective layerwise
    error_after: NotRequired[float]
    improved: bool
    layers: list[TunedLayer]
    tokens: TunedTokens
    seconds: float


class Tuned(Written):
    """`moeconv tune`."""

    tune: TuneBlock


class TunePlannedBlock(TypedDict):
    """What a dry run of a training knows."""

    objective: str
    steps: int


class TunePlanned(Written):
    """`moeconv tune --dry-run`."""

    tune: TunePlannedBlock
