"""The exact counterpart of an upcycle that changes the model: what it would have been with nothing drawn or rounded.

It is planned like the upcycle itself, with the method's edits at rest, in float32 and with every FFN from SOURCE. It
must compute what the source computes, and the written model must be it: tensor by tensor, up to the rounding of its
dtype and what the method may change. So what is inexact has a bound too. No torch, no bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moeconv.options import UpcycleOptions, from_keywords
from moeconv.plan.plan import Plan
from moeconv.upcycle.cut import Cut
from moeconv.upcycle.methods import METHODS, Method

_KEPT = ("granularity", "shared_experts", "router_std", "clustering")


@dataclass(frozen=True, slots=True)
class Forced:
    """Where the router cannot choose whole copies: every layer is given the `pieces` of one of the `copies`, at 1 /
    `scale` of the weights' sum each, which makes the FFN."""

    pieces: int
    copies: int
    scale: float


@dataclass(frozen=True, slots=True)
class Drift:
    """What a method may change in a matrix of an expert: a share of its values, and the RMS of the change over the
    matrix's own."""

    changed: float
    rms: float


@dataclass(frozen=True, slots=True)
class Counterpart:
    """`parameters` are those of plan_upcycle. `config` is the config that the plan writes: keys that the counterpart's
    plan says otherwise (dtype, top-k) are not looked at in the written one. `siblings`: the experts are theirs.
    `measured`: the written router's rows are, and cannot be planned again."""

    parameters: Mapping[str, Any]
    config: Mapping[str, Any]
    forced: Forced | None = None
    drift: Drift | None = None
    siblings: bool = False
    measured: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(said: Mapping[str, Any]) -> Counterpart:
        forced, drift = said["forced"], said["drift"]
        known = {"forced": forced and Forced(**forced), "drift": drift and Drift(**drift)}
        return Counterpart(**{**said, **known})


def counterpart(plan: Plan) -> Counterpart | None:
    """The counterpart of an upcycle's plan; None for one that is exact itself."""
    block, made = plan.block, plan.parameters
    if block["exact"]:
        return None
    options = from_keywords(UpcycleOptions, made)
    asked: dict[str, Any] = {"experts": block["num_experts"], "dtype": "float32", "seed": made["seed"]}
    if "copies" in block:  # of a Mixture-of-Experts: top-k by itself
        return Counterpart(asked, plan.config)
    method = METHODS[options.method]
    asked |= {name: made[name] for name in _KEPT if made[name] != getattr(UpcycleOptions(), name)}
    asked |= dict(method.idle)
    asked |= {"to": block["to"], "top_k": block["top_k"], "layers": ",".join(map(str, block["moe_layers"]))}
    asked["method"] = method.undrawn or options.method
    if method.partition:
        asked.pop("granularity", None)
    pieces = block["granularity"]
    cut = Cut(0, pieces, block["expert_width"], experts=block["num_experts"], top_k=block["top_k"])
    forced = None if method.grouped else Forced(pieces, cut.experts // pieces, method.scale(cut, options))
    return Counterpart(
        asked,
        plan.config,
        forced=forced,
        drift=_drift(method, options, cut.width),
        siblings=bool(made["experts_from"]),
        measured=options.router != "random",
    )


def _drift(method: Method, options: UpcycleOptions, width: int) -> Drift | None:
    if method.drift is None:
        return None
    share, rms = method.drift(options)
    return Drift(round(share * width) / width, rms)  # whole neurons are edited
