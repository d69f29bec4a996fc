"""The JSON of `moeconv upcycle`, with the check of a written model against its source."""

from __future__ import annotations

from typing_extensions import NotRequired, TypedDict

from moeconv.contract.calibrated import SourceTokens
from moeconv.contract.shared import Written


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


class Upcycled(Written):
    """`moeconv upcycle`."""

    upcycle: UpcycleBlock
