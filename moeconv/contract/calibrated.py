"""The JSON of `moeconv calibrate`, and the routing of a layer, which other commands print too."""

from __future__ import annotations

from typing_extensions import NotRequired, TypedDict, final

from moeconv.contract.shared import Memory


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
