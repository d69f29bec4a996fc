"""The JSON of `moeconv prune` and of its curve."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict

from moeconv.contract.shared import Written


class Cost(TypedDict):
    """How pruning changes the loss on --data, in nats per token."""

    loss: float
    reference_loss: float
    loss_increase: float
    kl: float
    tokens: int


class RefitLayer(TypedDict):
    """The refit of one layer: relative errors on held-out tokens with the old weights and with the new ones."""

    layer: int
    error_before: float
    error_after: float
    kept: bool
    tokens_per_expert: float
    tokens_needed: int


class RefitFigures(TypedDict):
    """What --refit measured."""

    layers: list[RefitLayer]


class WidthLayer(TypedDict):
    """A layer whose experts lost neurons: the relative error of its output on held-out tokens, and how many experts had
    too few tokens of their own (`pooled`)."""

    layer: int
    error: float
    tokens_per_expert: float
    tokens_needed: int
    pooled: int


class WidthFigures(TypedDict):
    """What was measured while experts lost neurons."""

    layers: list[WidthLayer]


class MixRow(TypedDict):
    """A mix of experts and neurons that --mix tried, and its cost on held-out text in nats per token."""

    experts: int
    width: int
    bytes: int  # of the whole model
    loss_increase: float
    kl: float
    tokens: int
    chosen: bool


class HealLayer(TypedDict):
    """The healing of one layer: relative errors of its output on held-out tokens, before and after."""

    layer: int
    error_before: float
    error_after: float
    kept: bool


class HealFigures(TypedDict):
    """What --heal measured: the steps per layer, and the layers."""

    steps: int
    layers: list[HealLayer]


class DistillFigures(TypedDict):
    """What --distill measured on held-out text."""

    steps: int
    kl_before: float | None
    kl_after: float | None
    loss_before: float | None
    loss_after: float | None
    improved: bool


class PruneBlock(TypedDict):
    """The block of `moeconv prune`. Experts have the numbers of the source; null is what a dry run does not measure."""

    criterion: str | None
    experts_before: int
    experts_after: int
    keep: dict[str, list[int]] | None
    scores: dict[str, list[float | None]] | None
    stats_of_twin: NotRequired[str]
    top_k_before: NotRequired[int]  # with --top-k
    top_k_after: NotRequired[int]
    width_before: NotRequired[int]  # with --width, --width-ratio and --mix
    width_after: NotRequired[int]
    multiple: NotRequired[int | None]
    width: NotRequired[WidthFigures]
    shared_width_before: NotRequired[int]  # where the shared expert loses neurons
    shared_width_after: NotRequired[int]
    shared_width: NotRequired[WidthFigures]
    shared_refit: NotRequired[RefitFigures]
    mix: NotRequired[list[MixRow]]  # with --mix
    scale: NotRequired[dict[str, float]]
    groups: NotRequired[dict[str, dict[str, list[int]]]]  # with --merge
    measured: NotRequired[Cost]
    refit: NotRequired[RefitFigures]
    heal: NotRequired[HealFigures]
    distill: NotRequired[DistillFigures]


class Pruned(Written):
    """What `moeconv prune` prints."""

    prune: PruneBlock


class CurveRow(TypedDict):
    """One point of the curve: the ratio of the experts' weights that it removes. `stability` is null without a
    bootstrap."""

    ratio: float
    experts: int
    bytes: int
    loss: float
    loss_increase: float
    kl: float
    stability: float | None
    width: NotRequired[int]  # with --mix: the neurons per expert
    removes: NotRequired[Literal["experts", "both", "neurons"]]  # with --mix


class Curve(TypedDict):
    """What `moeconv prune --curve` prints."""

    command: str
    output: str | None
    dry_run: bool
    criterion: str
    refit: bool
    reference_loss: float
    tokens: int
    curve: list[CurveRow]
    warnings: list[str]
    removal_order: dict[str, list[int]]
    seconds: NotRequired[float]
    phases: NotRequired[dict[str, float]]
