"""The step `arrange`: reads how often the experts were used, finds an order, and writes the model in that order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from moeconv.arrangement.order import ShareLoad, check_shares, even_order, share_load
from moeconv.arrangement.planner import check_arrangement, plan_arrangement
from moeconv.errors import UsageError
from moeconv.families.model import Model
from moeconv.options import parameters_of
from moeconv.plan.meter import Meter
from moeconv.requests import ArrangeRequest
from moeconv.runner.run import check_out, open_resolved, run_plan
from moeconv.types import JsonObject

if TYPE_CHECKING:
    from moeconv.calibrate.artifact import Statistics

# layer -> tokens of each expert by data source [sources, E], of each pair [E, E]
Uses = Mapping[int, tuple[np.ndarray, np.ndarray]]


def arrange(request: ArrangeRequest, *, meter: Meter) -> JsonObject:
    """Write MODEL with its experts in an order whose equal contiguous shares have equal load, and in which experts that
    process a token together share a device where possible."""
    model, options = open_resolved(request.model), request.arrange
    check_arrangement(model, request.plan)
    check_shares(model.num_experts, options.devices, model.groups[0])
    if options.stats is None:
        raise UsageError(
            "arrange needs statistics, which say how often each expert is used",
            hint="Pass --stats STATS from `moeconv calibrate MODEL STATS --data FILE`.",
        )
    check_out(request.out, model, request.write)
    twin = request.statistics.stats_of_twin
    found = _statistics(model, options.stats, twin=twin)
    uses = _uses(model, found)
    held_out = None if options.held_out is None else _uses(model, _statistics(model, options.held_out, twin=twin))
    order = {
        layer: even_order(load, pairs, options.devices, groups=model.groups[0]) for layer, (load, pairs) in uses.items()
    }
    as_it_is = {layer: np.arange(model.num_experts) for layer in uses}
    measured = {"before": _loads(uses, as_it_is, options.devices), "after": _loads(uses, order, options.devices)}
    if held_out is not None:
        measured |= {
            "held_out_before": _loads(held_out, as_it_is, options.devices),
            "held_out_after": _loads(held_out, order, options.devices),
        }
    block: JsonObject = {
        "devices": options.devices,
        **{name: _whole(loads) for name, loads in measured.items()},
        "layers": [
            {"layer": layer, **{name: asdict(loads[layer]) for name, loads in measured.items() if layer in loads}}
            for layer in order
        ],
        "order": {str(layer): of for layer, of in _plain(order).items()},
    }
    parameters = parameters_of(options, request.plan) | {
        "stats": _hash(dict(found.metadata)), "held_out": None, "order_sha256": _hash(block["order"]),
    }  # fmt: skip
    plan = plan_arrangement(model, _plain(order), request.plan, parameters=parameters, block=block)
    return run_plan(plan, model, request.out, request.write, meter=meter)


def _plain(order: Mapping[int, np.ndarray]) -> dict[int, list[int]]:
    """The order {layer: experts} as plain numbers."""
    return {layer: [int(e) for e in of] for layer, of in order.items()}


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _statistics(model: Model, path: str, *, twin: bool) -> Statistics:
    from moeconv.calibrate.artifact import load_statistics

    statistics = load_statistics(path)
    statistics.check_belongs(model, twin=twin)
    return statistics


def _uses(model: Model, statistics: Statistics) -> Uses:
    """How often the experts of every measured layer were used."""
    found = {}
    for layer in (*model.moe_layers, *(at for at in model.mtp_layers if at in statistics.prediction_layers)):
        load = np.asarray(statistics.layer(layer, "count"), np.float64)
        found[layer] = load, np.asarray(statistics.layer(layer, "coactivation"), np.float64)
    return found


def _loads(uses: Uses, order: Mapping[int, np.ndarray], devices: int) -> dict[int, ShareLoad]:
    return {
        layer: share_load(uses[layer][0].sum(0), uses[layer][1], of, devices)
        for layer, of in order.items() if layer in uses
    }  # fmt: skip


def _whole(loads: Mapping[int, ShareLoad]) -> JsonObject:
    """The means over the layers, and the largest load of any layer."""
    even = [of.max_over_mean for of in loads.values() if of.max_over_mean is not None]
    crossing = [of.crossing for of in loads.values() if of.crossing is not None]
    return {
        "max_over_mean": sum(even) / len(even) if even else None,
        "worst": max(even, default=None),
        "crossing": sum(crossing) / len(crossing) if crossing else None,
    }
