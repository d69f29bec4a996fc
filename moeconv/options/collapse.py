"""The options of `moeconv collapse`."""

from __future__ import annotations

from dataclasses import dataclass

from moeconv.options.declare import option


@dataclass(frozen=True)
class CollapseOptions:
    """Options of `moeconv collapse` only."""

    width: int | None = option(
        None, "Neurons of the FFN of every layer (default: those that compute a token in the source: experts per token "
        "times the width of an expert, plus the shared expert; at least the width of the source's dense layers)."
    )  # fmt: skip
    multiple: int | None = option(None, "Round the default width up to a multiple of N.")
    to: str | None = option(None, "Dense family to write (default: the first that computes the same elsewhere).",
                            metavar="FAMILY")  # fmt: skip
    neurons: str | None = option(
        None, "How the neurons are chosen (default: surgeon with --data, norm without).",
        choices=("surgeon", "energy", "norm", "random"),
    )  # fmt: skip
