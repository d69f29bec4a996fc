"""The JSON of `moeconv calibrate`, and the routing figures of a layer, which other commands print too."""

from __future__ import annotations

from typing import NotRequired, final

from typing_extensions import TypedDict

from moeconv.contract.shared import Memory


class Load(TypedDict):
    """The routing of one layer.

    `load` is each expert's share of the assignments of tokens to experts, `entropy` the router's mean entropy in nats,
    `max_over_mean` the largest load over the mean load, and `dead` the number of experts without any token.
    """

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
    """The most active half of a dense layer's neurons: their share of all activations, and of the energy."""

    layer: int
    rate_top_half: float
    energy_top_half: float


class Calibrated(TypedDict):
    """What `moeconv calibrate` prints."""

    output: str
    tokens: int
    sample_tokens: NotRequired[int]  # without --merge
    memory: NotRequired[Memory | None]  # without --merge
    sources: list[SourceTokens]
    layers: list[Load | NeuronLayer]
    seconds: NotRequired[float]
    phases: NotRequired[dict[str, float]]
    warnings: NotRequired[list[str]]
