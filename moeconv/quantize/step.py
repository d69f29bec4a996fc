"""The step quantize: the source decoded where it is quantized, codes chosen by data where asked, the plan run, a sample
of what was written decoded and compared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from moeconv.checkpoint.overlay import Overlay
from moeconv.contract import CodesFigures
from moeconv.errors import UsageError
from moeconv.families.model import Model
from moeconv.plan.execute import checked_jobs
from moeconv.plan.fuse import fuse
from moeconv.plan.meter import Meter
from moeconv.plan.overlay import ORIGIN
from moeconv.plan.plan import Item, Plan
from moeconv.plan.planned import planned_model
from moeconv.quantize.formats import FORMATS
from moeconv.quantize.gptq.need import gptq_workload
from moeconv.quantize.methods import check_method
from moeconv.quantize.proof import PackingProof
from moeconv.quantize.separate import plan_separate
from moeconv.requests import QuantizeRequest
from moeconv.runner.run import check_out, measuring, open_resolved, planned_memory, run_on_data, run_plan
from moeconv.stream.need import need_of
from moeconv.types import JsonObject
from moeconv.units import human_bytes

_CODES, _OVERLAY, _PRUNED = "codes", "overlay", "pruned"


@dataclass(frozen=True)
class _Packing:
    """A plan of packing, read from the source, and the model whose weights it packs: the source, decoded where it is
    quantized, with its experts taken apart."""

    plan: Plan
    view: Model


def plan_packing(model: Model, request: QuantizeRequest, *, overlay: Overlay | None = None) -> _Packing:
    """Plan a quantize; `overlay` has codes that data chose, for weights of the view."""
    from moeconv.quantize.decode import plan_decode
    from moeconv.quantize.planner import quantize_plan

    view, before, where = model, list[Plan](), model.checkpoint.path
    importance, twin = _importance(model, request)
    if model.quantization and request.quantize.requantize:
        before.append(plan_decode(model))
        view = planned_model(before[-1], companions=where)
    if (apart := plan_separate(view)) is not None:
        before.append(apart)
        view = planned_model(apart, companions=where)
    plan = quantize_plan(
        view, request.quantize, request.plan, overlay=overlay, importance=importance, stats_of_twin=twin
    )
    for made in reversed(before):
        fused = fuse(made, plan)
        assert fused is not None  # it decodes, and reads ranges
        # that experts were taken apart says nothing of the model: no step of its own
        plan = fused if made.command == "decode" else replace(fused, earlier=plan.earlier)
    return _Packing(replace(plan, warnings=(*plan.warnings, *_grown(plan, model))), view)


def _grown(plan: Plan, source: Model) -> list[str]:
    """The warning that packing made a checkpoint larger: one whose experts have fewer bits already."""
    before, after = source.checkpoint.nbytes, plan.nbytes
    if after <= before:
        return []
    kind = f" ({source.quantization.get('quant_method')} already)" if source.quantization else ""
    return [f"the result is larger than its source{kind}: {human_bytes(after)} against {human_bytes(before)}"]


def _importance(model: Model, request: QuantizeRequest) -> tuple[dict[int, float] | None, str | None]:
    """What --stats says of the layers, and the fingerprint of the twin that they are of, if of one."""
    path = request.quantize.stats
    if path is None:
        return None, None
    from moeconv.calibrate.artifact import layer_importance, load_statistics

    statistics = load_statistics(path)
    twin = statistics.check_belongs(model, twin=request.statistics.stats_of_twin)
    return layer_importance(statistics), twin


def _of_run_layers(plan: Plan, model: Model) -> list[Item]:
    """The packings of the experts of all layers that run. Those of multi-token-prediction layers, which do not, keep
    their searched scales."""
    return [
        item
        for item in plan.items()
        if item.changed == "expert" and item.inputs and model.roles[item.inputs[0].tensor].layer in model.moe_layers
    ]


def quantize(request: QuantizeRequest, *, meter: Meter) -> JsonObject:
    """Pack every expert, then decode a sample of what was written and compare it with the source."""
    model = open_resolved(request.model)
    options, out, write = request.quantize, request.out, request.write
    check_method(FORMATS[options.format], options.method)
    if (options.method == "gptq") != bool(request.data.data):
        text = (
            "--method gptq needs --data" if options.method == "gptq" else f"--method {options.method} reads no --data"
        )
        raise UsageError(text, hint="gptq chooses codes by what the experts are given: moeconv quantize --data FILE.")
    packing = plan_packing(model, request)
    plan = before = packing.plan

    def check(staged: Path) -> PackingProof:
        from moeconv.quantize.proof import prove_packing

        return prove_packing(plan, model, staged, before=before)

    if options.method != "gptq":
        return run_plan(plan, model, out, write, meter=meter, check=check)
    chosen = _of_run_layers(before, model)
    jobs = checked_jobs(write.jobs)
    if write.dry_run:
        result = run_plan(plan, model, out, write, meter=meter, check=check)
        asked = run_on_data(model, request.measure, {})
        asks = gptq_workload(packing.view, chosen, tokens=asked.tokens, seq_len=asked.seq_len, jobs=jobs)
        planned = planned_memory(need_of(model, replace(asked, **asks)), asked, request.measure)
        return result | {"memory": planned["memory"], "warnings": [*result["warnings"], *planned["warnings"]]}
    check_out(out, model, write)
    from moeconv.quantize.gptq.run import choose_codes, remarks_on

    def measure(folder: Path) -> CodesFigures:
        path = folder / _CODES
        return choose_codes(
            model,
            chosen,
            path,
            data=request.data,
            measure=request.measure,
            damping=options.damping,
            view=packing.view,
            seed=request.plan.seed,
            jobs=jobs,
            meter=meter,
        )

    decides = (options, request.plan, request.data, request.measure)
    with measuring("quantize", model, out, write, *decides, meter=meter) as measured:
        folder, found = measured.once("codes", measure)
        overlay = Overlay(folder / _CODES)
        plan = plan_packing(model, request, overlay=overlay).plan
        result = run_plan(
            plan, model, out, write, meter=meter, check=check, origins={ORIGIN: overlay}, measured=measured
        )
    result["quantize"].setdefault("error", {})["output"] = found
    result["warnings"] += remarks_on(found)
    return result
