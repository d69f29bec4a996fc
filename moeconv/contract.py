"""The JSON of every command, as types. `moeconv schema` prints them as JSON Schemas.

The tests hold every object that a command prints against its schema.

Fields are only ever added. What a type marks as NotRequired is there where its comment says so.
"""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import NotRequired, TypedDict, final

from moeconv.errors import UsageError, did_you_mean, escape

Device = Literal["memory", "disk", "file"]


class Memory(TypedDict):
    """Bytes that running the model took (of a dry run: will take), and those that were free."""

    peak_bytes: int
    free_bytes: int
    least_bytes: NotRequired[int]  # of a dry run
    tokens: NotRequired[int]  # of a dry run
    experts: NotRequired[Device]  # of a run
    activations: NotRequired[Device]  # of a run


@final
class Foreseen(TypedDict):
    """The dry run of a command that only measures: the memory that it will take."""

    command: str
    output: NotRequired[str]  # of one that writes a file
    dry_run: bool
    memory: Memory
    warnings: list[str]


class Counts(TypedDict):
    """Parameters in all, and those that compute a token."""

    total: int
    active: int


class RoleCounts(TypedDict):
    """Parameters of a checkpoint; null where only a known family could say."""

    total: int | None
    active: int | None
    experts: int | None
    router: int | None
    prediction: int | None  # of multi-token-prediction layers, which `total` and `active` leave out


class Quantization(TypedDict):
    """How a checkpoint's weights are packed."""

    format: str
    bits: float | None
    scheme: str | None
    roles: list[str]


class Inspected(TypedDict):
    """`moeconv inspect`; null is what cannot be said of an architecture that moeconv does not know."""

    path: str
    model_type: str | None
    kind: Literal["dense", "moe"] | None
    architecture: str | None
    layers: int | None
    moe_layers: list[int] | None
    mtp_layers: list[int] | None
    num_experts: int | None
    top_k: int | None
    shared_experts: int | None
    parameters: RoleCounts
    parameters_by_role: dict[str, int]
    bytes_by_role: dict[str, int]
    bytes: int
    dtypes: dict[str, int]
    flops_per_token: int | None
    quantization: Quantization | None
    tensors: int
    shards: int
    identity: str
    warnings: list[str]


class Load(TypedDict):
    """The routing of one layer: each expert's share of the assignments, the router's mean entropy in nats."""

    layer: int
    load: list[float]
    entropy: float | None
    max_over_mean: float
    dead: int


class SourceTokens(TypedDict):
    """A source of data, and how many of its tokens were used."""

    name: str
    tokens: int


@final
class NeuronLayer(TypedDict):
    """The busiest half of a dense layer's neurons: their share of the activity, and of the energy."""

    layer: int
    rate_top_half: float
    energy_top_half: float


class Calibrated(TypedDict):
    """`moeconv calibrate`."""

    output: str
    tokens: int
    sample_tokens: NotRequired[int]  # not of merged files
    memory: NotRequired[Memory | None]  # not of merged files
    sources: list[SourceTokens]
    layers: list[Load | NeuronLayer]
    seconds: NotRequired[float]
    warnings: NotRequired[list[str]]


class Difference(TypedDict):
    """Logits against logits: the largest difference, and that over the source's standard deviation."""

    max_abs_logit_diff: float
    relative: float
    spread: float


class Counterpart(Difference):
    """The same for the exact counterpart of an upcycle that is not exact; `difference` names a tensor that is wrong."""

    difference: str | None


class Equivalence(TypedDict):
    """The check of a written model against its source, null where it was not made."""

    checked: bool
    max_abs_logit_diff: float | None
    relative: float | None
    tokens: int
    # where it was made
    spread: NotRequired[float]
    strict_load: NotRequired[bool]
    problems: NotRequired[list[str]]
    dtype: NotRequired[str]
    top_k: NotRequired[int]
    all_on: NotRequired[Difference | None]
    default_run: NotRequired[str | None]
    counterpart: NotRequired[Counterpart]


class RouterLayer(TypedDict):
    """A measured router's layer: shares of the sample by first expert, and the share whose first expert is that of its
    own data."""

    layer: int
    load: list[float]
    own: float | None


class RouterFigures(TypedDict):
    """What `--router hidden` or `centroid` measured."""

    kind: str
    tokens: int
    sources: list[SourceTokens]
    layers: list[RouterLayer]


class SplitLayer(TypedDict):
    """What `--method split` measured in one layer: the neurons that always compute, the relative error of the output,
    the same with the mean of what is left out added, and the regression that made the router's rows."""

    layer: int
    always_on: int
    error: float
    compensated_error: float
    router: str


UpcycleBlock = TypedDict(
    "UpcycleBlock",
    {
        "method": str,
        "from": str,
        "to": str,
        "num_experts": int,
        "top_k": int,
        "moe_layers": list[int],
        "exact": bool,
        "equivalence": NotRequired[Equivalence],
        # of a dense source
        "expert_width": NotRequired[int],
        "shared_width": NotRequired[int],
        "granularity": NotRequired[int],
        # of an MoE source
        "copies": NotRequired[int],
        # --method split
        "active_share": NotRequired[float],
        "layers": NotRequired[list[SplitLayer]],
        "stats_of_twin": NotRequired[str],
        "compensation": NotRequired[str],
        # --router hidden or centroid
        "router": NotRequired[RouterFigures],
    },
)


class Cost(TypedDict):
    """What a prune does to the loss on --data, in nats per token."""

    loss: float
    reference_loss: float
    loss_increase: float
    kl: float
    tokens: int


class RefitLayer(TypedDict):
    """How the refit of one layer fared on held-out tokens: relative errors with the old weights and with the new."""

    layer: int
    error_before: float
    error_after: float
    kept: bool
    tokens_per_expert: float


class RefitFigures(TypedDict):
    """What --refit measured."""

    layers: list[RefitLayer]


class DistillFigures(TypedDict):
    """What --distill measured on held-out text."""

    steps: int
    kl_before: float | None
    kl_after: float | None
    loss_before: float | None
    loss_after: float | None
    improved: bool


class PruneBlock(TypedDict):
    """The block of `moeconv prune`: experts by their old numbers; null is what a dry run does not measure."""

    criterion: str | None
    experts_before: int
    experts_after: int
    keep: dict[str, list[int]] | None
    scores: dict[str, list[float | None]] | None
    stats_of_twin: NotRequired[str]
    top_k_before: NotRequired[int]  # with --top-k
    top_k_after: NotRequired[int]
    scale: NotRequired[dict[str, float]]
    groups: NotRequired[dict[str, dict[str, list[int]]]]  # with --merge
    measured: NotRequired[Cost]
    refit: NotRequired[RefitFigures]
    distill: NotRequired[DistillFigures]


class MeanMax(TypedDict):
    """Over the sampled weights."""

    mean: float
    max: float


class ErrorLayer(TypedDict):
    """Relative RMS error of one layer's sampled weights; `layer` is null outside the decoder layers."""

    layer: int | None
    relative_rms: float
    max: float


class CodesLayer(TypedDict):
    """Output error of one layer by the chosen codes and by round-to-nearest, on held-out tokens."""

    layer: int
    output_rms: float
    output_rms_rtn: float
    output_rms_gptq: float
    kept: bool
    fewest_tokens: int
    tokens_per_expert: float


class CodesFigures(TypedDict):
    """What --method gptq measured."""

    layers: list[CodesLayer]
    tokens: int
    held_out: int


class PackingError(TypedDict):
    """The error of a sample of weights that were decoded again; not with --no-check."""

    relative_rms: NotRequired[MeanMax]
    layers: NotRequired[list[ErrorLayer]]
    sampled: NotRequired[int]
    output: NotRequired[CodesFigures]


class QuantizeBlock(TypedDict):
    """The block of `moeconv quantize`."""

    format: str
    scheme: str
    method: str
    group_size: int | None
    bits_by_layer: dict[str, int]
    scheme_by_layer: dict[str, str]
    group_size_by_layer: dict[str, int | None]
    scope: str
    double_quant: bool
    loads: dict[str, str]
    stats_of_twin: NotRequired[str]
    error: NotRequired[PackingError]
    counted: NotRequired[dict[str, int]]


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
    """Tokens that trained, and those that judged."""

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


class Between(TypedDict):
    """The pruned model that was never written."""

    bytes: int
    total: int
    active: int


class Written(TypedDict):
    """What every command that writes a checkpoint prints, with a block of its own."""

    command: str
    output: str
    plan_id: str | None  # null where training decides what is written
    dry_run: bool
    tensors: int
    shards: int
    bytes: int
    parameters: Counts
    changed: dict[str, int]
    seconds: float
    peak_rss_bytes: int
    warnings: list[str]
    files: dict[str, str]
    memory: NotRequired[Memory]  # of a dry run that would run the model
    part: NotRequired[str]  # with --part
    complete: NotRequired[bool]


class Upcycled(Written):
    """`moeconv upcycle`."""

    upcycle: UpcycleBlock


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


class Pruned(Written):
    """`moeconv prune`."""

    prune: PruneBlock


class Quantized(Written):
    """`moeconv quantize`; of a recipe that prunes in the same pass, also the prune."""

    quantize: QuantizeBlock
    prune: NotRequired[PruneBlock]
    between: NotRequired[Between]


class CurveRow(TypedDict):
    """One ratio of the curve; `stability` is null where no bootstrap was made."""

    ratio: float
    experts: int
    bytes: int
    loss: float
    loss_increase: float
    kl: float
    stability: float | None


class Curve(TypedDict):
    """`moeconv prune --curve`."""

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


class SourceLoss(TypedDict):
    """The loss on one source of data."""

    name: str
    tokens: int
    loss: float | None
    reference_loss: NotRequired[float | None]  # with --reference
    kl: NotRequired[float | None]


class Gate(TypedDict):
    """A limit, what was measured, and whether it passes; a value that is NaN is null and fails."""

    limit: float
    value: float | None
    passed: bool


class Perplexity(TypedDict):
    """Loss in nats per token, and its exponential."""

    loss: float | None
    perplexity: float | None


class NotFinite(TypedDict):
    """The first layer and tensor that make a loss NaN or infinite."""

    message: str
    hint: str


class Evaluated(TypedDict):
    """`moeconv evaluate`; a figure that is NaN or infinite is null."""

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


class Checked(TypedDict):
    """How much was looked at."""

    shards: int
    tensors: int
    bytes: int


class Loads(TypedDict):
    """Whether the model loads strictly and runs; null where --load was not given."""

    transformers: bool | None


class Verified(TypedDict):
    """`moeconv verify`."""

    ok: bool
    problems: list[str]
    checked: Checked
    manifest: bool
    loads: Loads
    warnings: list[str]


FamilyPair = TypedDict("FamilyPair", {"from": str, "to": str, "exact": bool, "default": bool, "note": str})


class Families(TypedDict):
    """`moeconv families`."""

    dense: list[str]
    moe: list[str]
    multimodal: dict[str, list[str]]
    pairs: list[FamilyPair]


class FormatRow(TypedDict):
    """A scheme of a format; `bits` is null for mixed ones."""

    name: str
    format: str
    scheme: str
    bits: int | None
    loads: dict[str, str]
    notes: dict[str, str]


class Formats(TypedDict):
    """`moeconv formats`."""

    formats: list[FormatRow]


class StepRow(TypedDict):
    """A step of a recipe; null is what was not measured."""

    step: str
    seconds: float
    output: NotRequired[str | None]
    total: NotRequired[int]
    active: NotRequired[int]
    bytes: NotRequired[int]
    loss: NotRequired[float | None]
    kl: NotRequired[float | None]
    passed: NotRequired[bool]
    kept: NotRequired[bool]  # taken from an earlier run
    result: NotRequired[dict[str, object]]  # the step's own JSON
    fused_into: NotRequired[str | None]
    # of a dry run
    plan_id: NotRequired[str | None]
    largest_item_bytes: NotRequired[int | None]
    memory_bytes: NotRequired[int | None]


class Ran(TypedDict):
    """`moeconv run` and `moeconv demo`."""

    command: str
    recipe: str
    dry_run: bool
    output: str
    steps: list[StepRow]
    warnings: list[str]
    report: NotRequired[str]
    disk_bytes: NotRequired[int]  # of a dry run
    disk_free_bytes: NotRequired[int]


class Located(TypedDict):
    """`moeconv demo --where`."""

    output: str


class Reported(TypedDict):
    """`moeconv report`; `figures` are what the page shows."""

    command: str
    output: str
    bytes: int
    figures: dict[str, object]


class Schemas(TypedDict):
    """`moeconv schema`: a JSON Schema per command."""

    schemas: dict[str, dict[str, object]]


class ErrorFields(TypedDict):
    """The exit code, and what an error says."""

    code: int
    message: str
    hint: str | None


class Failed(TypedDict):
    """What any command prints with --json when it fails."""

    error: ErrorFields


# command -> what it prints with --json; every one of them prints `Failed` instead when it fails
RESULTS: dict[str, tuple[type, ...]] = {
    "inspect": (Inspected,),
    "upcycle": (Upcycled,),
    "calibrate": (Calibrated, Foreseen),
    "tune": (Tuned, TunePlanned),
    "prune": (Pruned, Curve),
    "quantize": (Quantized,),
    "evaluate": (Evaluated, Foreseen),
    "verify": (Verified,),
    "report": (Reported,),
    "run": (Ran,),
    "demo": (Ran, Located),
    "families": (Families,),
    "formats": (Formats,),
    "schema": (Schemas,),
}


def json_schema(command: str) -> dict[str, object]:
    """The JSON Schema (draft 2020-12) of what a command prints with --json, its error among it."""
    from pydantic import TypeAdapter

    kinds = [*RESULTS[command], Failed]
    union: Any = kinds[0]
    for kind in kinds[1:]:
        union = union | kind
    about: dict[str, object] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"moeconv {command} --json",
    }
    return about | TypeAdapter(union).json_schema()


def schemas(command: str | None = None) -> Schemas:
    """The JSON Schema of one command or of all. Raises UsageError for a command that there is not."""
    if command is not None and command not in RESULTS:
        raise UsageError(f"there is no command {escape(command)}", hint=did_you_mean(command, RESULTS))
    return {"schemas": {name: json_schema(name) for name in RESULTS if command in (None, name)}}
