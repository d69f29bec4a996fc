"""The figures of a report as types: what `figures.gather` returns, `--json` prints and the page shows.

A number is None if the result that should state it has no finite number there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NotRequired

from typing_extensions import TypedDict

from moeconv.contract import Inspected

Number = float | int | None


class HistoryRow(TypedDict):
    """A step of the manifest, as the command that performs it."""

    command: str
    total: Number
    active: Number
    changed: str
    plan_id: str
    source: str
    version: str


class PipelineRow(TypedDict):
    """A step of the last recipe that was run."""

    step: str
    total: Number
    active: Number
    bytes: Number
    loss: Number
    kl: Number
    seconds: Number


class SourceRow(TypedDict):
    """The loss on one source of data, in nats per token."""

    name: str
    tokens: Number
    loss: Number
    reference_loss: Number
    kl: Number


class GateRow(TypedDict):
    """A limit of an evaluation and the value that was measured."""

    name: str
    value: Number
    limit: Number
    passed: bool


class TaskRow(TypedDict):
    """One metric of one request file of --tasks."""

    task: str
    metric: str
    questions: Number
    value: Number
    stderr: Number
    reference: Number


class EvaluationFigures(TypedDict):
    """One result of `moeconv evaluate`."""

    loss: Number
    perplexity: Number
    reference_loss: Number
    kl: Number
    agreement: Number
    tokens: Number
    sources: list[SourceRow]
    tasks: list[TaskRow]
    gates: list[GateRow]


class Verdict(TypedDict):
    """What a reader looks for first: the number of checks and gates that were run, and descriptions of the failed
    ones."""

    checked: int
    failed: list[str]


class About(TypedDict):
    """What the report is about: the directory, when its manifest was written (a date, UTC), versions by name, and the
    names of the data that the figures come from."""

    path: str
    reference: str | None
    date: str | None
    versions: dict[str, str]
    data: list[str]


class CurveFigures(TypedDict):
    """What a curve of pruning was measured with, and the loss of the unpruned model."""

    criterion: str
    refit: bool
    reference_loss: Number


class ErrorRow(TypedDict):
    """Relative RMS errors of one quantized layer: of its weights, and with gptq of its outputs."""

    layer: Number
    relative_rms: Number
    output_rms: Number
    output_rms_rtn: Number


class Balance(TypedDict):
    """How evenly a router spreads tokens over the experts of its layer."""

    entropy: Number
    max_over_mean: Number
    dead: Number


class TuningLayer(TypedDict):
    """A layer's balance before and after training."""

    layer: Number
    after: Balance
    before: Balance


class TuningFigures(TypedDict):
    """The last result of `moeconv tune`."""

    objective: str
    steps: Number
    loss_before: Number
    loss_after: Number
    kl_before: Number
    kl_after: Number
    error_before: Number
    error_after: Number
    layers: list[TuningLayer]


class PruningLayer(TypedDict):
    """The score of every expert of a layer, and the experts that were kept."""

    layer: str
    scores: list[Number]
    kept: list[int]


class MixPoint(TypedDict):
    """A number of experts and of neurons that `prune --mix` tried."""

    experts: Number
    width: Number
    loss_increase: Number
    chosen: bool


class PruningFigures(TypedDict):
    """The last result of `moeconv prune`. The widths are null where the experts, or the
    shared expert, kept their neurons."""

    criterion: str
    before: Number
    after: Number
    width_before: Number
    width_after: Number
    shared_width_before: Number
    shared_width_after: Number
    mix: list[MixPoint]
    layers: list[PruningLayer]


class StatisticsFigures(TypedDict):
    """What a statistics file was measured on."""

    of_this_model: bool
    num_experts: int
    tokens: int
    sources: list[str]


class UtilizationRow(TypedDict):
    """How one layer's router used its experts: shares of the assignments, in all and by source of data."""

    layer: int
    load: list[float]
    by_source: list[list[float]]
    entropy: float
    entropy_share: float
    max_over_mean: float
    dead: int


class Dendrogram(TypedDict):
    """A tree of experts: the `order` of the leaves, and for each join its four x (in leaves) and its four y
    (distances).

    Of many experts, the tree is cut: a leaf "(n)" stands for n experts.
    """

    order: list[int | str]
    joins: list[tuple[list[float], list[float]]]


class SimilarityRow(TypedDict):
    """Similarities of one layer's experts, [E][E] each."""

    layer: int
    output_cosine: list[list[float]]
    router_cosine: list[list[float]]
    logit_correlation: list[list[float]]
    dendrogram: Dendrogram | None


class SampleRow(TypedDict):
    """What the reference ("before") and the model write after a prompt, greedily. `cut`: time ran out before an end."""

    prompt: str
    before: str | None
    after: str
    cut: bool


class Figures(TypedDict):
    """Everything that a report shows; of the last four, three come from a statistics file, and the
    samples from --samples."""

    model: Inspected
    reference: Inspected | None
    history: list[HistoryRow]
    pipeline: list[PipelineRow]
    evaluations: list[EvaluationFigures]
    equivalence: Mapping[str, object]
    quantization_error: list[ErrorRow]
    tuning: TuningFigures | None
    pruning: PruningFigures | None
    curve: list[Mapping[str, object]]
    curve_of: CurveFigures | None
    verdict: Verdict
    about: About
    warnings: list[str]
    statistics: NotRequired[StatisticsFigures]
    utilization: NotRequired[list[UtilizationRow]]
    similarity: NotRequired[list[SimilarityRow]]
    samples: NotRequired[list[SampleRow]]


class ReportResult(TypedDict):
    """The JSON object of `moeconv report`."""

    command: str
    output: str
    bytes: int
    figures: Figures
    markdown: NotRequired[str]
    card: NotRequired[str]
