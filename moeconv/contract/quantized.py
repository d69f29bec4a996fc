"""The JSON of `moeconv quantize`, with the error of the packed weights."""

from __future__ import annotations

from typing import NotRequired

from typing_extensions import TypedDict

from moeconv.contract.pruned import PruneBlock
from moeconv.contract.shared import Written


class MeanMax(TypedDict):
    """The mean and the maximum over the sampled weights."""

    mean: float
    max: float


class ErrorLayer(TypedDict):
    """Relative RMS error of one layer's sampled weights; `layer` is null outside the decoder layers."""

    layer: int | None
    relative_rms: float
    max: float


class CodesLayer(TypedDict):
    """Output error of one layer on held-out tokens, with the written codes, with round-to-nearest, and with GPTQ
    (None: it was not tried, or there are too few tokens to choose codes with). `method` is the one whose codes are
    written, and `folded` lists what AWQ's factors are folded into: norm, up."""

    layer: int
    output_rms: float
    output_rms_rtn: float
    output_rms_gptq: float | None
    output_rms_by_method: dict[str, float]
    method: str
    folded: list[str]
    kept: bool
    fewest_tokens: int
    tokens_per_expert: float
    tokens_needed: int


class CodesFigures(TypedDict):
    """What --method gptq, awq or auto measured."""

    layers: list[CodesLayer]
    tokens: int
    held_out: int


class PackingError(TypedDict):
    """The error of a sample of weights that were decoded again; empty with --no-check."""

    relative_rms: NotRequired[MeanMax]
    layers: NotRequired[list[ErrorLayer]]
    sampled: NotRequired[int]
    output: NotRequired[CodesFigures]


class RestScheme(TypedDict):
    """The scheme of the weights that --rest packs."""

    scheme: str
    group_size: int | None


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
    scheme_by_tensor: NotRequired[dict[str, str]]
    rest: NotRequired[RestScheme]
    stats_of_twin: NotRequired[str]
    error: NotRequired[PackingError]
    counted: NotRequired[dict[str, int]]


class Between(TypedDict):
    """Sizes of the pruned model between the two steps, which was never written."""

    bytes: int
    total: int
    active: int


class Quantized(Written):
    """What `moeconv quantize` prints; in a recipe that prunes in the same pass, with the block of that prune."""

    quantize: QuantizeBlock
    prune: NotRequired[PruneBlock]
    between: NotRequired[Between]
