"""Runs a command from its request, for the command line, recipes and Python programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module

from moeconv import requests as r
from moeconv.plan.meter import Meter
from moeconv.plan.phases import timing
from moeconv.types import JsonObject

# class of the request -> module and name of the function that does it; modules are loaded on use
STEPS: Mapping[type, str] = {
    r.InspectRequest: "moeconv.inspect.step:inspect",
    r.UpcycleRequest: "moeconv.upcycle.step:upcycle",
    r.CalibrateRequest: "moeconv.calibrate.step:calibrate",
    r.TuneRequest: "moeconv.tune.step:tune",
    r.PruneRequest: "moeconv.prune.step:prune",
    r.QuantizeRequest: "moeconv.quantize.step:quantize",
    r.ImportRequest: "moeconv.importing.step:import_gguf_file",
    r.ArrangeRequest: "moeconv.arrangement.step:arrange",
    r.CollapseRequest: "moeconv.collapsing.step:collapse",
    r.EvaluateRequest: "moeconv.evaluate.step:evaluate",
    r.VerifyRequest: "moeconv.verify.step:verify",
    r.ReportRequest: "moeconv.report.step:report_page",
    r.RunRequest: "moeconv.recipe.run:run_file",
}
TIMED = (
    r.UpcycleRequest, r.CalibrateRequest, r.TuneRequest, r.PruneRequest, r.QuantizeRequest, r.ArrangeRequest,
    r.CollapseRequest, r.EvaluateRequest,
)  # fmt: skip


def step_of(kind: type) -> Callable[..., Mapping[str, object]]:
    """The function that does what a request of class `kind` asks for."""
    module, _, name = STEPS[kind].partition(":")
    found: Callable[..., Mapping[str, object]] = getattr(import_module(module), name)
    return found


def run_request(request: object, meter: Meter) -> JsonObject:
    """The JSON of the command that `request` asks for. Raises what the command raises."""
    return timed(request, lambda: step_of(type(request))(request, meter=meter))


def timed(request: object, step: Callable[[], Mapping[str, object]]) -> JsonObject:
    """What `step` returns, with the total seconds and those of its phases. A dry run states no time."""
    with timing() as clock:
        result = dict(step())
        whole = clock.total()
    if isinstance(request, TIMED) and not result.get("dry_run"):
        phases = {name: round(seconds, 3) for name, seconds in clock.seconds.items()}
        result |= {"seconds": round(whole, 3), "phases": phases}
    return result
