"""The exact counterpart of an upcycle that changes the model: the same upcycle with nothing drawn and nothing rounded.

It is planned like the upcycle itself, but with options at which the method edits nothing, in float32, and with every
FFN from the source. It must compute what the source computes, and the written model must equal it tensor by tensor, up
to the rounding of its dtype and to what the method may change. An inexact upcycle therefore has a bound too. Imports no
torch and reads no bytes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from moeconv.options import UpcycleOptions, from_keywords
from moeconv.plan.plan import Plan
from moeconv.types import Config, JsonObject
from moeconv.upcycle.cut import Cut
from moeconv.upcycle.methods import METHODS, Method

_KEPT = ("granularity", "shared_experts", "router_std", "clustering", "text_only", "ffn_only")


@dataclass(frozen=True, slots=True)
class Forced:
    """What the check makes the router choose, where it cannot choose whole copies by itself: in every layer the
    `pieces` of one of the `copies`, each weighted by 1 / `scale` of the sum of the weights. Together they are the
    FFN."""

    pieces: int
    copies: int
    scale: float


@dataclass(frozen=True, slots=True)
class Drift:
    """What a method may change in a matrix of an expert: the share of its values that change, and the RMS of the change
    as a share of the matrix's RMS."""

    changed: float
    rms: float


@dataclass(frozen=True, slots=True)
class ExactCounterpart:
    """How to plan the counterpart, and how to compare it. `parameters` are those of `plan_upcycle`. `config` is the
    config that the upcycle's plan writes; keys in which the counterpart's plan differs from it (dtype, top-k) are not
    compared. `siblings`: the experts come from siblings. `measured`: the router's rows were measured, so that they
    cannot be planned again and are not compared. `copies`: the source is a Mixture-of-Experts, whose expert e has
    copies[layer][e] copies with a top-k that stays. The written model itself is then the counterpart, where in place of
    its router's choice it computes copies of the experts that the source chooses, with the source's weights. `added`:
    further experts come from siblings."""

    parameters: JsonObject
    config: Config
    forced: Forced | None = None
    drift: Drift | None = None
    siblings: bool = False
    measured: bool = False
    copies: Config | None = None
    added: bool = False

    def to_json(self) -> JsonObject:
        return asdict(self)

    @staticmethod
    def from_json(value: JsonObject) -> ExactCounterpart:
        forced, drift = value["forced"], value["drift"]
        known = {"forced": forced and Forced(**forced), "drift": drift and Drift(**drift)}
        return ExactCounterpart(**{**value, **known})


def counterpart(plan: Plan) -> ExactCounterpart | None:
    """The counterpart of an upcycle's plan; None for a plan that is exact itself."""
    block, made = plan.block, plan.parameters
    if block["exact"]:
        return None
    options = from_keywords(UpcycleOptions, made)
    parameters: JsonObject = {"experts": block["num_experts"], "dtype": "float32", "seed": made["seed"]}
    if "added" in block:
        ones = {str(layer): [1] * (block["num_experts"] - len(block["added"])) for layer in block["moe_layers"]}
        parameters = {key: made[key] for key in ("sibling_expert", "ffn_only") if made.get(key)}
        parameters |= {"dtype": "float32", "seed": made["seed"]}
        return ExactCounterpart(parameters, plan.config, copies=ones, measured=True, added=True)
    if "copies_of" in block:
        parameters |= {"keep_top_k": True, "copy_scale": block["copy_scale"]}
        return ExactCounterpart(parameters, plan.config, copies=block["copies_of"])
    if "copies" in block:  # an upcycle of a Mixture-of-Experts: top-k follows from the experts
        return ExactCounterpart(parameters, plan.config)
    method = METHODS[options.method]
    usual = asdict(UpcycleOptions())
    parameters |= {name: made[name] for name in _KEPT if made.get(name, usual[name]) != usual[name]}
    parameters |= dict(method.idle)
    parameters |= {"to": block["to"], "top_k": block["top_k"], "layers": ",".join(map(str, block["moe_layers"]))}
    parameters["method"] = method.undrawn or options.method
    if method.partition:
        parameters.pop("granularity", None)
    pieces = block["granularity"]
    cut = Cut(0, pieces, block["expert_width"], experts=block["num_experts"], top_k=block["top_k"])
    forced = None if method.grouped else Forced(pieces, cut.experts // pieces, method.scale(cut, options))
    return ExactCounterpart(
        parameters,
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
