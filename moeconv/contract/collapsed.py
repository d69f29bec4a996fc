"""The JSON of `moeconv collapse`."""

from __future__ import annotations

from typing import NotRequired

from typing_extensions import TypedDict

from moeconv.contract.shared import Written


class CollapsedLayer(TypedDict):
    """One layer. `distinct`: its neurons that differ in their rows of gate and up, and add to its output. The errors of
    the FFN's output are relative to that wanted, on held-out tokens, and null without --data: `error` that of the
    written FFN, `mean_error` that of its neurons with their columns times the mean weights of their experts. `fitted`:
    the columns are those of the fit, which is clearly better."""

    layer: int
    distinct: int
    error: float | None
    mean_error: float | None
    fitted: bool


# `from` is a keyword of Python, so that this type is written as a call
CollapseBlock = TypedDict(
    "CollapseBlock",
    {
        "from": str,
        "to": str,
        "width": int,
        "experts_before": int,
        "top_k_before": int,
        "expert_width": int,
        "shared_width": int,
        "collapsed_layers": list[int],
        "neurons": str,
        "tokens": NotRequired[int],  # with --data
        "layers": NotRequired[list[CollapsedLayer]],  # not in a dry run
    },
)


class Collapsed(Written):
    """What `moeconv collapse` prints."""

    collapse: CollapseBlock
