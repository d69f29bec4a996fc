"""The step `collapse`: makes a dense FFN of the experts of every layer, and writes the dense model."""

from __future__ import annotations

from pathlib import Path

from moeconv.checkpoint.overlay import Overlay
from moeconv.collapsing.need import collapse_workload
from moeconv.collapsing.planner import Collapse, choice_of_neurons, collapse_of, collapse_plan
from moeconv.options import SEQ_LEN, TOKENS, device_limit, parse_size
from moeconv.plan.meter import Meter
from moeconv.plan.overlay import ORIGIN
from moeconv.plan.phases import phase
from moeconv.requests import CollapseRequest
from moeconv.runner.run import check_out, measuring, open_resolved, planned_memory, run_on_data, run_plan
from moeconv.stream.need import need_of
from moeconv.types import JsonObject
from moeconv.units import counted

_FILE = "collapsed"


def collapse(request: CollapseRequest, *, meter: Meter) -> JsonObject:
    """Write MODEL as a dense model. With --data, the neurons of each layer are chosen and fitted on text; without, the
    weights decide."""
    model, options, write = open_resolved(request.model), request.collapse, request.write
    how = choice_of_neurons(options, has_data=bool(request.data.data))
    made = collapse_of(model, options, request.plan)
    check_out(request.out, model, write)
    if write.dry_run:
        return _dry_run(made, request, how, meter=meter)
    decides = (options, request.plan, request.data, request.measure)
    with measuring("collapse", model, request.out, write, *decides, meter=meter) as measured:
        folder, figures = measured.once("collapse", lambda folder: _measured(made, request, how, folder, meter=meter))
        overlay = Overlay(folder / _FILE)
        plan = collapse_plan(made, options, request.plan, neurons=how, overlay=overlay, figures=figures)
        result = run_plan(
            plan, model, request.out, write, meter=meter, origins={ORIGIN: overlay}, figures=figures, measured=measured
        )
    result["warnings"] += _remarks(made, request, figures["layers"])
    return result


def _dry_run(made: Collapse, request: CollapseRequest, how: str, *, meter: Meter) -> JsonObject:
    plan = collapse_plan(made, request.collapse, request.plan, neurons=how)
    result = run_plan(plan, made.model, request.out, request.write, meter=meter)
    if request.data.data:
        asked = run_on_data(made.model, request.measure, collapse_workload(made.model, made.width.after))
        planned = planned_memory(need_of(made.model, asked), asked, request.measure)
        result |= {"memory": planned["memory"], "warnings": [*result["warnings"], *planned["warnings"]]}
    return result


@phase("measure")
def _measured(made: Collapse, request: CollapseRequest, how: str, folder: Path, *, meter: Meter) -> JsonObject:
    """Write the FFNs into `folder`. Returns their figures."""
    from moeconv.collapsing.fit.measure import collapse_by_weights, collapse_on_data

    model, measure, seed = made.model, request.measure, request.plan.seed
    if not request.data.data:
        return {"layers": collapse_by_weights(made, folder / _FILE, how=how, seed=seed)}
    from moeconv.data.windows import load_tokens, sequence_length
    from moeconv.stream.device import pick_device
    from moeconv.stream.layers import start_meter, stream_within

    read = load_tokens(
        request.data.data, model.checkpoint.path, tokens=measure.tokens or TOKENS,
        seq_len=sequence_length(model, measure.seq_len, default=SEQ_LEN), seed=seed, text_field=measure.text_field,
    )  # fmt: skip
    meter.note("collapsing the experts layer by layer")
    start_meter(meter, model, tokens=read.windows.size)
    limit = None if measure.max_memory is None else parse_size(measure.max_memory, flag="--max-memory")
    stream = stream_within(
        model, read.windows, device=pick_device(measure.device, device_limit(measure.max_device_memory)),
        batch_size=measure.batch_size, budget=limit,
        meter=meter, what="running the collapsed model beside the model",
        **collapse_workload(model, made.width.after),
    )  # fmt: skip
    layers, _ = collapse_on_data(made, stream, read, folder / _FILE, how=how, seed=seed)
    return {"tokens": read.tokens, "layers": layers}


def _remarks(made: Collapse, request: CollapseRequest, layers: list[JsonObject]) -> list[str]:
    """Warnings: without text, the result is exact only where all neurons have a place."""
    most, width = max(row["distinct"] for row in layers), made.width.after
    found = []
    if not request.data.data and most > width:
        found.append(
            f"{counted(most, 'distinct neuron')} in the experts of a layer, of which {width} stay by the norms of "
            "their weights: pass --data, by which they are chosen and fitted, and tune the result"
        )
    if most < width:
        found.append(
            f"the experts of a layer have at most {counted(most, 'distinct neuron')}; the others of the {width} are "
            f"zero: --width {max(most, made.width.dense)} writes the same function"
        )
    return found
