"""The step upcycle: open the siblings, measure a router or a partition where one is asked for, run the plan, and check
the result against the source."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from moeconv.checkpoint.safetensors_file import SafetensorsFile
from moeconv.checkpoint.staging import Measured
from moeconv.contract import RouterFigures
from moeconv.errors import UsageError
from moeconv.families.model import Model
from moeconv.options import parameters_of
from moeconv.plan.flow import ByteSource
from moeconv.plan.meter import Meter
from moeconv.plan.overlay import ORIGIN
from moeconv.plan.partition import ORIGIN as PARTITION
from moeconv.plan.phases import phase
from moeconv.plan.plan import Plan
from moeconv.requests import UpcycleRequest
from moeconv.runner.run import check_out, measuring, open_resolved, run_plan
from moeconv.types import JsonObject
from moeconv.upcycle.check.step import NOT_CHECKED, check_source, equivalence
from moeconv.upcycle.extend import extend
from moeconv.upcycle.kept_top_k import check_extends
from moeconv.upcycle.methods import METHODS, partitioning, which
from moeconv.upcycle.relatedness import check_related
from moeconv.upcycle.siblings import open_siblings

_ROUTER = "router.safetensors"


def upcycle(request: UpcycleRequest, *, meter: Meter) -> JsonObject:
    """Convert a dense checkpoint to a Mixture-of-Experts, and check the staged model against the source."""
    from moeconv.upcycle.planner import origins_of, upcycle_plan

    options, out, write = request.upcycle, request.out, request.write
    model = open_resolved(request.source)
    check_extends(model, options)
    if options.keep_top_k or options.add_experts_from:
        return extend(model, request, meter=meter)
    siblings = open_siblings(model, options.experts_from, ffn_only=options.ffn_only)
    splits = METHODS[options.method].partition
    if splits and options.router != "random":
        raise UsageError(
            f"--method {options.method} does not use --router: it fits a router of its own", hint="Leave --router out."
        )
    if request.data.data and not splits and options.router == "random":
        raise UsageError(
            "this upcycle does not use --data",
            hint=f"Leave --data out; {which(partitioning())} and --router hidden or centroid use it.",
        )
    origins: dict[str, ByteSource] = dict(origins_of(siblings))
    figures: JsonObject = {}  # what was measured before the plan was made
    split_by: Path | None = None
    measures = (splits or options.router != "random") and not write.dry_run
    with ExitStack() as stack:
        measured: Measured | None = None
        if measures:
            check_out(out, model, write)
            decides = (options, request.plan, request.data, request.measure, request.calibrate)
            measured = stack.enter_context(measuring("upcycle", model, out, write, *decides, meter=meter))
        if measured and splits:
            from moeconv.upcycle.measured_split import measure_partition

            partition = measure_partition(model, request, measured, meter=meter)
            origins[PARTITION], split_by = partition.file, partition.file.path
            plan = upcycle_plan(model, options, request.plan, siblings=siblings, partition=partition)
        else:
            plan = upcycle_plan(model, options, request.plan, siblings=siblings)
        warnings = check_related(model, siblings)
        if measured and options.router != "random":
            overlay, figures["router"] = _measured_router(model, plan, measured, request, meter=meter)
            origins[ORIGIN] = overlay
            plan = upcycle_plan(model, options, request.plan, siblings=siblings, overlay=overlay)
        if not (measured or write.dry_run or write.no_check or write.part):
            check_out(out, model, write)
            with phase("check"):
                check_source(model, plan)
        result = run_plan(
            plan, model, out, write, meter=meter, origins=origins, figures=figures,
            check=lambda staged: equivalence(model, staged, plan, siblings=siblings, partition=split_by),
            measured=measured,
        )  # fmt: skip
    result["warnings"] = warnings + result["warnings"]
    result["upcycle"] = figures | result["upcycle"]
    result["upcycle"].setdefault("equivalence", dict(NOT_CHECKED))
    return result


def _measured_router(
    model: Model, plan: Plan, measured: Measured, request: UpcycleRequest, *, meter: Meter
) -> tuple[SafetensorsFile, RouterFigures]:
    """The router rows that the plan asks for, measured on the source into an overlay, and their figures."""
    from moeconv.upcycle.planner import router_rows
    from moeconv.upcycle.router import measure_router

    names, rows = router_rows(plan)
    asked = parameters_of(request.data, request.measure)

    def measure(folder: Path) -> RouterFigures:
        path = folder / _ROUTER
        return measure_router(
            model, path, kind=request.upcycle.router, names=names, experts=rows, seed=request.plan.seed, meter=meter,
            **asked,
        )  # fmt: skip

    folder, found = measured.once("router", measure)
    return SafetensorsFile(folder / _ROUTER), found
