"""The JSON of `moeconv upcycle`, with the check of a written model against its source."""

from __future__ import annotations

from typing import NotRequired

from typing_extensions import TypedDict

from moeconv.contract.calibrated import SourceTokens
from moeconv.contract.shared import Written


class Difference(TypedDict):
    """The difference between two models' logits: the largest one, the same divided by `spread`, and `spread`.

    `spread` is the standard deviation of the source's logits.
    """

    max_abs_logit_diff: float
    relative: float
    spread: float


class Counterpart(Difference):
    """The difference for the exact counterpart of an upcycle that is not exact.

    `difference` names the first tensor that is not what it should be, given the counterpart; null if there is none.
    """

    difference: str | None


class Equivalence(TypedDict):
    """The check of a written model against its source; figures are null if it was not made."""

    checked: bool
    max_abs_logit_diff: float | None
    relative: float | None
    tokens: int
    # if the check was made
    spread: NotRequired[float]
    strict_load: NotRequired[bool]
    problems: NotRequired[list[str]]
    dtype: NotRequired[str]
    top_k: NotRequired[int]
    all_on: NotRequired[Difference | None]
    default_run: NotRequired[str | None]
    counterpart: NotRequired[Counterpart]


class RouterLayer(TypedDict):
    """One layer of a router that was made from data.

    `load` is the share of the sample's tokens that each expert gets as first choice, `own` the share of tokens whose
    first choice is the expert of their own data.
    """

    layer: int
    load: list[float]
    own: float | None


class RouterFigures(TypedDict):
    """What was measured for `--router hidden` or `--router centroid`."""

    kind: str
    tokens: int
    sources: list[SourceTokens]
    layers: list[RouterLayer]


class ExtendedSource(TypedDict):
    """The losses before and after on one --data value, in nats per token."""

    name: str
    loss: float | None
    reference_loss: float | None


class Extended(TypedDict):
    """What more experts change on --data: losses in nats per token, and the share of the chosen experts of all tokens
    that are new, in the mean over the layers (`new_share`) and in each of them."""

    loss: float | None
    reference_loss: float | None
    loss_increase: float | None
    kl: float | None
    tokens: int
    sources: list[ExtendedSource]
    new_share: float
    layers: list[float]


class AddedLayer(TypedDict):
    """The share of the held-out tokens of each --data value that choose each new expert in a layer; null for a value
    without held-out tokens."""

    layer: int
    picked: list[list[float] | None]


class SplitLayer(TypedDict):
    """What `--method split` measured in one layer.

    `always_on` is the number of neurons that compute for every token, `error` the relative error of the output,
    `compensated_error` the same after the mean of what is not computed is added, and `router` the regression that gave
    the router's rows.
    """

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
        # with a dense source
        "expert_width": NotRequired[int],
        "shared_width": NotRequired[int],
        "granularity": NotRequired[int],
        # with an MoE source
        "copies": NotRequired[int],
        # with --keep-top-k
        "copies_of": NotRequired[dict[str, list[int]]],
        "copy_scale": NotRequired[float],
        # with --add-experts-from
        "added": NotRequired[list[str]],
        "rows": NotRequired[list[AddedLayer]],
        # with --keep-top-k or --add-experts-from, and --data
        "measured": NotRequired[Extended],
        # with --method split
        "active_share": NotRequired[float],
        "layers": NotRequired[list[SplitLayer]],
        "stats_of_twin": NotRequired[str],
        "compensation": NotRequired[str],
        # with --router hidden or centroid
        "router": NotRequired[RouterFigures],
    },
)


class Upcycled(Written):
    """What `moeconv upcycle` prints."""

    upcycle: UpcycleBlock
