"""The options of `moeconv arrange`."""

from __future__ import annotations

from dataclasses import dataclass

from moeconv.options.declare import option


@dataclass(frozen=True)
class ArrangeOptions:
    """Options of `moeconv arrange` only."""

    devices: int = option(2, "Number of devices; each gets an equal contiguous share of the experts.")
    stats: str | None = option(None, "Statistics from `moeconv calibrate`.", reads="file")
    held_out: str | None = option(None, "Statistics of other text, to evaluate the new order on as well.", reads="file")
