"""The JSON of `moeconv arrange`."""

from __future__ import annotations

from typing import NotRequired

from typing_extensions import TypedDict

from moeconv.contract.shared import Written


class ShareFigures(TypedDict):
    """Equal contiguous shares of the experts of a layer: the largest load over the mean load, and the fraction of
    expert pairs processing a token together that are in different shares. null where nothing was routed."""

    max_over_mean: float | None
    crossing: float | None


class ArrangedFigures(ShareFigures):
    """The means over all layers, and the largest ratio of the largest load to the mean load in any layer."""

    worst: float | None


class ArrangedLayer(TypedDict):
    """One layer."""

    layer: int
    before: ShareFigures
    after: ShareFigures
    held_out_before: NotRequired[ShareFigures]  # with --held-out
    held_out_after: NotRequired[ShareFigures]


class ArrangeBlock(TypedDict):
    """The block of `moeconv arrange`. `order` {layer: numbers in the source of the experts in their new order}."""

    devices: int
    before: ArrangedFigures
    after: ArrangedFigures
    held_out_before: NotRequired[ArrangedFigures]  # with --held-out
    held_out_after: NotRequired[ArrangedFigures]
    layers: list[ArrangedLayer]
    order: dict[str, list[int]]


class Arranged(Written):
    """What `moeconv arrange` prints."""

    arrange: ArrangeBlock
