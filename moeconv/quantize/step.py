"""The step quantize: decode the source where it is quantized, choose codes by data where that is asked for, run the
plan, and compare a decoded sample of the result with the source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moeconv.checkpoint.imatrix import open_imatrix
from moeconv.checkpoint.overlay import Overlay
from moeconv.contract import CodesFigures
from moeconv.errors import UsageError
from moeconv.families.model import Model
from moeconv.options import QuantizeOptions
from moeconv.plan.execute import checked_jobs
from moeconv.plan.flow import ByteSource
from moeconv.plan.fuse import fuse
from moeconv.plan.meter import Meter
from moeconv.plan.overlay import ORIGIN
from moeconv.plan.plan import Item, Plan
from moeconv.plan.planned import planned_model
from moeconv.quantize.formats import FORMATS
from moeconv.quantize.gguf.importance import ORIGIN as IMPORTANCE
from moeconv.quantize.gptq.need import CODED_BYTES, gptq_workload
from moeconv.quantize.inputs import ORIGIN as INPUTS
from moeconv.quantize.methods import check_method
from moeconv.quantize.proof import PackingProof
from moeconv.quantize.spec import BY_DATA, FOLDING, TRIED
from moeconv.quantize.untouched import untouched
from moeconv.requests import QuantizeRequest
from moeconv.runner.run import check_out, measuring, open_resolved, planned_memory, run_on_data, run_plan
from moeconv.stream.need import Workload, WorkloadFields, need_of
from moeconv.types import JsonObject
from moeconv.units import human_bytes
from moeconv.world import announce, check_alone, current, follow

_CODES, _INPUTS = "codes", "inputs"


@dataclass(frozen=True)
class _Packing:
    """A plan that packs weights and reads the source. `view` is the model whose weights it packs: the source, decoded
    where it is quantized, and with separate experts."""

    plan: Plan
    view: Model


def plan_packing(
    model: Model, request: QuantizeRequest, *, overlay: Overlay | None = None, inputs: Overlay | None = None
) -> _Packing:
    """Plan a quantize. `overlay` has codes that data chose for weights of the view, and `inputs` the scales of inputs
    that were measured."""
    from moeconv.quantize.decode import plan_decode
    from moeconv.quantize.layout.required import fused_with_layout, layout_for
    from moeconv.quantize.planner import quantize_plan

    view, before, where = model, list[Plan](), model.checkpoint.path
    importance, twin = _importance(model, request)
    if model.quantization and request.quantize.requantize:
        before.append(plan_decode(model))
        view = planned_model(before[-1], companions=where)
    if (layout := layout_for(view, FORMATS[request.quantize.format])) is not None:
        view = planned_model(layout, companions=where)
    plan = quantize_plan(
        view, request.quantize, request.plan, overlay=overlay, inputs=inputs, importance=importance, stats_of_twin=twin
    )
    if layout is not None:
        plan = fused_with_layout(layout, plan)
    for made in before:
        fused = fuse(made, plan)
        assert fused is not None  # the plan before it decodes
        plan = untouched(fused)
    return _Packing(replace(plan, warnings=(*plan.warnings, *_grown(plan, model))), view)


def _grown(plan: Plan, source: Model) -> list[str]:
    """The warning that packing makes a checkpoint larger, as where its experts have fewer bits already."""
    before, after = source.checkpoint.nbytes, plan.nbytes
    if after <= before:
        return []
    kind = f" ({source.quantization.get('quant_method')} already)" if source.quantization else ""
    return [f"the result is larger than its source{kind}: {human_bytes(after)} instead of {human_bytes(before)}"]


def _origins(request: QuantizeRequest) -> dict[str, ByteSource]:
    """What the plan reads besides the source: the importance matrix."""
    path = request.quantize.imatrix
    return {} if path is None else {IMPORTANCE: open_imatrix(path)}


def _importance(model: Model, request: QuantizeRequest) -> tuple[dict[int, float] | None, str | None]:
    """(importance of each layer by --stats, identity of the checkpoint that was measured where it is not this one)."""
    path = request.quantize.stats
    if path is None:
        return None, None
    from moeconv.calibrate.artifact import layer_importance, load_statistics

    statistics = load_statistics(path)
    twin = statistics.check_belongs(model, twin=request.statistics.stats_of_twin)
    return layer_importance(statistics), twin


def _of_run_layers(plan: Plan, model: Model) -> list[Item]:
    """The packings of the experts of all layers that run. Those of multi-token-prediction layers, which do not, keep
    their searched scales, and weights that are in the layout already keep their codes."""
    return [
        item
        for item in plan.items()
        if item.changed == "expert"
        and item.inputs
        and item.inputs[0].origin == "source"
        and not item.params.get("untouched")
        and model.roles[item.inputs[0].tensor].layer in model.moe_layers
    ]


def quantize(request: QuantizeRequest, *, meter: Meter) -> JsonObject:
    """Pack every expert; then decode a sample of the result and compare it with the source."""
    model = open_resolved(request.model)
    options, out, write = request.quantize, request.out, request.write
    check_method(FORMATS[options.format], options.method)
    by_data, inputs = options.method in BY_DATA, _stores_inputs(options)
    if (by_data or inputs) != bool(request.data.data):
        what = f"--scheme {options.scheme}" if inputs and not by_data else f"--method {options.method}"
        hint = f"{', '.join(BY_DATA)} choose codes by data: --method gptq --data FILE."
        raise UsageError(
            f"{what} {'needs' if by_data or inputs else 'does not use'} --data",
            hint="The scales of inputs are measured on text: --data FILE." if inputs else hint,
        )
    packing = plan_packing(model, request)
    plan = before = packing.plan
    folds: Overlay | None = None

    def check(staged: Path) -> PackingProof:
        from moeconv.quantize.proof import prove_packing

        return prove_packing(plan, model, staged, before=before, folds=folds)

    if inputs or not by_data:
        what = f"--scheme {options.scheme}" if inputs else f"--method {options.method}"
        check_alone(f"quantize {what}", hint="Run it without torchrun; --part I/N shares the work.")
    if not (by_data or inputs):
        return run_plan(plan, model, out, write, meter=meter, check=check, origins=_origins(request))
    chosen = _of_run_layers(before, model)
    if by_data and not chosen:
        raise UsageError(
            f"--method {options.method} has no codes to choose: the experts are in this layout already",
            hint="Leave --method out, or choose another --scheme.",
        )
    jobs = checked_jobs(write.jobs, each=CODED_BYTES)
    if write.dry_run:
        result = run_plan(plan, model, out, write, meter=meter, check=check)
        asked = run_on_data(model, request.measure, {})
        asks = _workload(packing, chosen, asked, jobs=jobs, method=options.method) if by_data else WorkloadFields()
        planned = planned_memory(need_of(model, replace(asked, **asks)), asked, request.measure)
        return result | {"memory": planned["memory"], "warnings": [*result["warnings"], *planned["warnings"]]}
    check_out(out, model, write)
    from moeconv.quantize.gptq.inputs import measure_inputs
    from moeconv.quantize.gptq.run import beside_of, choose_codes, remarks_on

    def scales(folder: Path) -> list[str]:
        return measure_inputs(
            model,
            before.items(),
            folder / _INPUTS,
            data=request.data,
            measure=request.measure,
            view=packing.view,
            seed=request.plan.seed,
            meter=meter,
        )

    def measure(folder: Path) -> CodesFigures:
        path = folder / _CODES
        return choose_codes(
            model,
            chosen,
            path,
            data=request.data,
            measure=request.measure,
            damping=options.damping,
            method=options.method,
            beside=beside_of(packing.view, before.items()) if options.method in FOLDING else (),
            written=planned_model(before, companions=model.checkpoint.path) if options.method in TRIED else None,
            ordered=options.actorder == "static",
            view=packing.view,
            seed=request.plan.seed,
            jobs=jobs,
            meter=meter,
        )

    def together(folder: Path) -> CodesFigures:
        announce(_CODES, folder)
        return measure(folder)

    if not current().leads:
        follow({_CODES: measure})
        return {"command": "quantize", "output": out, "quantize": {}}
    decides = (options, request.plan, request.data, request.measure)
    with measuring("quantize", model, out, write, *decides, meter=meter) as measured:
        origins: dict[str, Overlay] = {}
        if inputs:
            folder, remarks = measured.once("inputs", scales)
            origins[INPUTS] = Overlay(folder / _INPUTS)
        if by_data:
            folder, found = measured.once("codes", together)
            folds = origins[ORIGIN] = Overlay(folder / _CODES)
        announce(None)
        plan = plan_packing(model, request, overlay=folds, inputs=origins.get(INPUTS)).plan
        result = run_plan(plan, model, out, write, meter=meter, check=check, origins=origins, measured=measured)
    if by_data:
        result["quantize"].setdefault("error", {})["output"] = found
        result["warnings"] += remarks_on(found, method=options.method)
    result["warnings"] += remarks if inputs else []
    return result


def _stores_inputs(options: QuantizeOptions) -> bool:
    """Whether the scheme stores scales of inputs, which are measured."""
    return any(info.inputs for info in FORMATS[options.format].schemes if info.name == options.scheme)


def _workload(
    packing: _Packing, chosen: Sequence[Item], asked: Workload, *, jobs: int, method: str
) -> WorkloadFields:  # fmt: skip
    return gptq_workload(packing.view, chosen, tokens=asked.tokens, seq_len=asked.seq_len, jobs=jobs, method=method)
