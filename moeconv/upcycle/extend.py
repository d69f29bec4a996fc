"""More experts for a Mixture-of-Experts: measure the utility of its experts, write the result, and measure its loss."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moeconv.checkpoint.hub import resolve
from moeconv.checkpoint.safetensors_file import SafetensorsFile
from moeconv.checkpoint.staging import Measured
from moeconv.contract import AddedLayer, Extended
from moeconv.errors import UsageError
from moeconv.families.model import Model
from moeconv.options import UpcycleOptions, parameters_of
from moeconv.plan.flow import ByteSource
from moeconv.plan.meter import Meter
from moeconv.plan.overlay import ORIGIN
from moeconv.plan.plan import Plan
from moeconv.requests import UpcycleRequest
from moeconv.runner.run import check_out, measuring, run_plan
from moeconv.types import JsonObject
from moeconv.upcycle.added import origins_of_added
from moeconv.upcycle.added_sources import open_added
from moeconv.upcycle.check.step import NOT_CHECKED, check_source, equivalence
from moeconv.upcycle.kept_top_k import Copies, by_utility, new_of, number_of_experts
from moeconv.upcycle.relatedness import check_vocabulary

if TYPE_CHECKING:
    from moeconv.calibrate.artifact import Statistics

_STATISTICS, _ROWS = "statistics.safetensors", "rows.safetensors"


def extend(model: Model, request: UpcycleRequest, *, meter: Meter) -> JsonObject:
    """Write the model with more experts and the same top-k: copies, which go to the experts that `--stats` or `--data`
    show to be useful, or those of siblings, whose router rows are measured. On `--data`, the losses of both models are
    measured."""
    from moeconv.upcycle.planner import upcycle_plan

    options, out, write, data = request.upcycle, request.out, request.write, request.data.data
    added = open_added(model, options)
    if write.part and data:
        raise UsageError("--part cannot measure on --data", hint="Leave out --part, or --data.")
    copies = None if added else _before_data(model, request)
    plan = upcycle_plan(model, options, request.plan, copies=copies, added=added)
    warnings = [text for one in added for text in check_vocabulary(model, one.model, one.label)]
    origins: dict[str, ByteSource] = dict(origins_of_added(added))
    figures: JsonObject = {}
    with ExitStack() as stack:
        measured: Measured | None = None
        if not write.dry_run and (data or added):
            check_out(out, model, write)
            decides = (options, request.plan, request.data, request.measure, request.calibrate)
            measured = stack.enter_context(measuring("upcycle", model, out, write, *decides, meter=meter))
        if measured and added:
            overlay, figures["rows"] = _measured_rows(model, request, measured, len(added), meter=meter)
            origins[ORIGIN] = overlay
            plan = upcycle_plan(model, options, request.plan, added=added, overlay=overlay)
        elif measured and not options.stats:
            copies = _copies(model, options, _measured_statistics(model, request, measured, meter=meter))
            plan = upcycle_plan(model, options, request.plan, copies=copies)
        if not (write.dry_run or write.no_check or write.part):
            check_out(out, model, write)
            check_source(model, plan)

        def check(staged: Path) -> JsonObject:
            paths = [str(resolve(path)) for path in options.add_experts_from]
            found: JsonObject = {} if write.no_check else equivalence(model, staged, plan, added=paths)
            return found | ({"measured": _losses(model, staged, plan, request, meter=meter)} if data else {})

        result = run_plan(
            plan, model, out, replace(write, no_check=write.no_check and not data), meter=meter, check=check,
            origins=origins, figures=figures, measured=measured,
        )  # fmt: skip
    result["warnings"] = warnings + result["warnings"]
    result["upcycle"] = figures | result["upcycle"]
    result["upcycle"].setdefault("equivalence", dict(NOT_CHECKED))
    return result


def _before_data(model: Model, request: UpcycleRequest) -> Copies | None:
    """The copies by --stats; before --data is measured, numbers of the right sum; None for equal numbers."""
    from moeconv.calibrate.artifact import load_statistics

    options = request.upcycle
    if options.stats is not None:
        statistics = load_statistics(options.stats)
        statistics.check_belongs(model, twin=request.statistics.stats_of_twin)
        return _copies(model, options, statistics)
    if not request.data.data:
        return None
    even = by_utility(model, number_of_experts(model, options), [1.0] * model.num_experts)
    return dict.fromkeys(model.moe_layers, even)


def _measured_rows(
    model: Model, request: UpcycleRequest, measured: Measured, count: int, *, meter: Meter
) -> tuple[SafetensorsFile, list[AddedLayer]]:
    """The overlay with the router entries of `count` new experts, and how often they are chosen."""
    from moeconv.upcycle.added_rows import check_data, measure_rows

    check_data(model, count, request.data.data)

    def measure(folder: Path) -> list[AddedLayer]:
        return measure_rows(
            model, folder / _ROWS, count=count, data=request.data, measure=request.measure, seed=request.plan.seed,
            meter=meter,
        )  # fmt: skip

    folder, found = measured.once("rows", measure)
    return SafetensorsFile(folder / _ROWS), found


def _measured_statistics(model: Model, request: UpcycleRequest, measured: Measured, *, meter: Meter) -> Statistics:
    """The statistics of --data."""
    from moeconv.calibrate.artifact import load_statistics
    from moeconv.calibrate.run import calibrate

    asked = parameters_of(request.calibrate, request.data, request.measure)

    def measure(folder: Path) -> None:
        calibrate(
            str(model.checkpoint.path), folder / _STATISTICS, seed=request.plan.seed, overwrite=True, meter=meter,
            **asked,
        )  # fmt: skip

    return load_statistics(measured.once("statistics", measure, resumes=True)[0] / _STATISTICS)


def _copies(model: Model, options: UpcycleOptions, statistics: Statistics) -> dict[int, list[int]]:
    """The copies of every measured layer, by the saliency of REAP: the sum of g ||f|| over the tokens of an expert."""
    experts = number_of_experts(model, options)
    measured = (*model.moe_layers, *(at for at in model.mtp_layers if at in statistics.prediction_layers))
    return {
        layer: by_utility(
            model, experts, np.asarray(statistics.layer(layer, "gate_norm_sum"), np.float64).sum(0).tolist()
        )
        for layer in measured
    }


def _losses(model: Model, staged: Path, plan: Plan, request: UpcycleRequest, *, meter: Meter) -> Extended:
    """The losses of the staged model and of the source on --data, and how often new experts are chosen."""
    from moeconv.evaluate.run import evaluate

    measure = request.measure
    found = evaluate(
        staged, reference=model.checkpoint.path, data=request.data.data, tokens=measure.tokens,
        seq_len=measure.seq_len, batch_size=measure.batch_size, device=measure.device, seed=request.plan.seed,
        text_field=measure.text_field, max_memory=measure.max_memory, meter=meter,
    )  # fmt: skip
    behind = list(range(model.num_experts, plan.block["num_experts"]))
    copies = plan.block.get("copies_of")
    new = {layer: behind if copies is None else new_of(copies[str(layer)]) for layer in model.moe_layers}
    shares = [float(np.asarray(at["load"])[new[at["layer"]]].sum()) for at in found["layers"]]
    reference = found["reference"]
    before, loss = None if reference is None else reference["loss"], found["loss"]
    return {
        "loss": loss,
        "reference_loss": before,
        "loss_increase": None if loss is None or before is None else loss - before,
        "kl": found["kl"],
        "tokens": found["tokens"],
        "sources": [
            {"name": s["name"], "loss": s["loss"], "reference_loss": s.get("reference_loss")} for s in found["sources"]
        ],
        "new_share": float(np.mean(shares)) if shares else 0.0,
        "layers": [round(share, 6) for share in shares],
    }
