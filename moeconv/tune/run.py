"""`tune`: trains the router of a Mixture-of-Experts and whatever else --train names, and writes an overlay.

The model itself is not written here: `plan_overlay` and `execute` apply the overlay. Of several processes (torchrun),
each computes its share of every batch, and the first one reads the data and writes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from moeconv.checkpoint.artifact import artifact_metadata, is_artifact
from moeconv.checkpoint.target import check_file_target
from moeconv.checkpoint.writer import writing_artifact
from moeconv.data.windows import TokenData, load_tokens, sequence_length
from moeconv.errors import InputError, UsageError
from moeconv.families.records import Routing
from moeconv.options import (
    SEQ_LEN,
    DataOptions,
    MeasureOptions,
    TuneOptions,
    check_names,
    device_limit,
    from_keywords,
    parse_size,
    reads_of,
)
from moeconv.plan.kernels.stored import to_bytes
from moeconv.plan.meter import Meter, SilentMeter
from moeconv.plan.phases import phase
from moeconv.stream.device import pick_device
from moeconv.stream.finite import NotFiniteError, not_finite, scanned
from moeconv.stream.layers import start_meter
from moeconv.stream.need import noted_placement
from moeconv.tune.disturb import Disturbance
from moeconv.tune.job import Job, make_job
from moeconv.tune.layerwise import LayerMeasure, LayerTraining, each_layer
from moeconv.tune.losses import RoutingLoad
from moeconv.tune.need import tokens_of, whole
from moeconv.tune.network import load_network
from moeconv.tune.optimise import Outcome, optimise
from moeconv.tune.parameters import Piece, pieces_of, written
from moeconv.tune.rebalance import Rebalance, rebalancing
from moeconv.tune.routing import Block, Routed, recording
from moeconv.tune.whole import ModelTraining
from moeconv.tune.windows import batches, split
from moeconv.tune.words import tensors_of
from moeconv.types import JsonObject
from moeconv.units import counted, human_seconds
from moeconv.world import current, first

OVERLAY_VERSION = 1
_HEARTBEAT = 30.0  # seconds between notes

Put = Callable[[Sequence[Piece], bool], None]
M = TypeVar("M")


@phase("train")
def tune(
    model_path: str | os.PathLike[str],
    overlay_path: str | os.PathLike[str],
    *,
    seed: int = 0,
    overwrite: bool = False,
    meter: Meter | None = None,
    **parameters: Any,
) -> JsonObject:
    """Train, and write an overlay of the trained tensors. `parameters` are the fields of TuneOptions, DataOptions and
    MeasureOptions.

    The objectives: distill minimises KL(teacher || student) of the logits; lm the next-token loss; layerwise, layer by
    layer, the error to the outputs of the teacher's FFN on the inputs of that FFN. layerwise computes no logits and
    returns error_before and error_after instead of losses: the squared error relative to the squared output, averaged
    over the layers.

    A tenth of the windows is held out. What is written are the best values of a few evaluations on these windows or, if
    none was better (`improved` is false), the source's own bytes.

    Returns {objective, train, steps, learning_rate, loss_before, loss_after, kl_before, kl_after, improved, layers
    [{layer, load, entropy, max_over_mean, dead, before}], tokens {trained, held_out}, seconds, warnings}.
    Raises InputError for models or data that do not go together and for routers without a gradient, OutputError for an
    overlay that exists or that is an input.
    """
    began = time.monotonic()
    check_names(parameters, TuneOptions, DataOptions, MeasureOptions)
    options, measure = from_keywords(TuneOptions, parameters), from_keywords(MeasureOptions, parameters)
    budget = None if measure.max_memory is None else parse_size(measure.max_memory, flag="--max-memory")
    device, path = pick_device(measure.device, device_limit(measure.max_device_memory)), Path(overlay_path)
    if current().leads:
        check_file_target(
            path, what="overlay", reads=[("the model", model_path), *reads_of(parameters, TuneOptions, DataOptions)],
            overwrite=overwrite, replaces=lambda old: is_artifact(old, "overlay"),
        )  # fmt: skip
    job = make_job(model_path, options, seed=seed, batch_size=measure.batch_size)
    meter = meter or SilentMeter()
    meter.note("reading the data")
    data = first(lambda: _read(job, from_keywords(DataOptions, parameters).data, options, measure))
    metadata = artifact_metadata("overlay", **_provenance(job, data))
    with _overlay(job, path, metadata=metadata, overwrite=overwrite) as put:
        train = _layerwise if job.objective == "layerwise" else _whole
        disturbance = Disturbance(job.router_noise, job.temperature, job.capacity_factor, seed)
        block = train(TrainingRun(job, data, device, budget, meter, put, disturbance))
    return block | {"seconds": time.monotonic() - began}


@dataclass(frozen=True)
class TrainingRun:
    """A job and its data. `put(pieces, improved)` writes pieces to the overlay: the trained values, or the source's
    bytes."""

    job: Job
    data: TokenData
    device: torch.device
    max_memory: int | None
    meter: Meter
    put: Put
    disturbance: Disturbance

    def recording(self, blocks: Sequence[Block]) -> AbstractContextManager[Callable[[], list[Routed]]]:
        model, through = self.job.student, self.job.straight_through
        return recording(
            blocks, model.family.experts.routing or Routing(), renormalise=model.renormalises, straight_through=through,
            disturbance=self.disturbance,
        )  # fmt: skip

    def rebalance(self, blocks: Sequence[Block]) -> Rebalance | None:
        return rebalancing(blocks, step=self.job.bias_update) if self.job.bias_update else None


def _read(job: Job, paths: Sequence[str], options: TuneOptions, measure: MeasureOptions) -> TokenData:
    """Read the windows. Without --tokens, the number of windows is what training draws or, with layerwise, what
    calibration uses."""
    models = [m for m in (job.student, job.teacher) if m is not None]
    length = min(sequence_length(m, measure.seq_len, default=SEQ_LEN) for m in models)
    tokens = tokens_of(options, measure, length=length)
    return load_tokens(
        paths, job.student.checkpoint.path, tokens=tokens, seq_len=length, seed=job.seed,
        text_field=measure.text_field,
    )  # fmt: skip


def _provenance(job: Job, data: TokenData) -> JsonObject:
    return {
        "version": OVERLAY_VERSION,
        "identity": job.student.identity,
        "teacher": job.teacher.identity if job.teacher else None,
        "objective": job.objective,
        "train": list(job.train),
        "steps": job.schedule.steps,
        "batch_size": job.batch_size,
        "learning_rate": dict(job.schedule.rates),
        "balance": job.balance,
        "z_loss": job.z_loss,
        "straight_through": job.straight_through,
        "schedule": job.schedule.decay,
        "bias_update": job.bias_update,
        "router_noise": job.router_noise,
        "temperature": job.temperature,
        "capacity_factor": job.capacity_factor,
        "seed": job.seed,
        "seq_len": data.seq_len,
        "sources": [source.to_json() for source in data.sources],
    }


@contextmanager
def _overlay(job: Job, path: Path, *, metadata: Mapping[str, str], overwrite: bool) -> Iterator[Put]:
    """Write the overlay file: first its header, then each tensor as it is ready. The file appears when it is
    complete."""
    source = job.student.checkpoint
    header = [(n, source.tensors[n].dtype, source.tensors[n].shape) for n in tensors_of(job.student, job.opened)]
    leads = current().leads
    file = writing_artifact(path, header, metadata=metadata, overwrite=overwrite) if leads else nullcontext()
    with file as writer:

        def put(pieces: Sequence[Piece], improved: bool) -> None:
            if improved:
                for name, value in written(pieces):
                    if writer is not None:
                        writer.write(name, to_bytes(value))
            elif writer is not None:
                for piece in pieces:
                    writer.write(piece.name, source.read(piece.name))

        yield put


# -- through the whole model -----------------------------------------------------------------------------------------


def _whole(run: TrainingRun) -> JsonObject:
    job = run.job
    _check_memory(run)
    run.meter.note("loading the model" + (" and its teacher" if job.teacher else ""))
    student = load_network(job.student, device=run.device, train=job.opened)
    teacher = load_network(job.teacher, device=run.device) if job.teacher else None
    training, held = split(run.data, batch_size=job.batch_size)
    pieces = pieces_of(job.student, job.opened, blocks=student.blocks, named=student.named)
    size = min(job.batch_size, len(training))
    if size < current().size:
        raise UsageError(
            f"a batch of {counted(size, 'sequence')} cannot be shared by {current().size} processes",
            hint="Raise --batch-size, give more text, or start fewer processes.",
        )
    order = batches(len(training), size, key=(job.seed, "tune", "windows"))
    routing = job.student.family.experts.routing or Routing()  # of a dense student there is nothing to route
    run.meter.start(total_bytes=job.schedule.steps, parts=job.schedule.steps, unit="step")
    with run.recording(student.blocks) as take_routed:
        task = ModelTraining(
            student, teacher, routing, take_routed, job.objective, job.balance, job.z_loss, run.device,
            run.disturbance, run.rebalance(student.blocks),
        )  # fmt: skip
        outcome = optimise(
            pieces,
            schedule=job.schedule,
            step=lambda i: task.step(training[next(order)], number=i),
            measure=lambda: task.measure(held, batch_size=job.batch_size),
            score=task.score,
            note=_reporting(run, "", lambda m: f"{_HELD_OUT[job.objective]} {task.score(m):.4f}"),
            not_finite=lambda: _not_finite_error(job),
        )
        run.put(pieces, outcome.improved)
    before, after = outcome.before, outcome.after
    loads = [(before.loads[at], after.loads[at]) for at in job.student.moe_layers]
    block = _block(run, [outcome], loads, trained=training, held=held)
    block |= {"loss_before": before.loss, "loss_after": after.loss, "kl_before": before.kl, "kl_after": after.kl}
    return block | {"warnings": [*job.warnings, *_remarks(outcome, _HELD_OUT[job.objective])]}


def _not_finite_error(job: Job) -> NotFiniteError:
    """The error for a loss that is NaN: it names a tensor of the student, or of the teacher if the student's are
    finite."""
    mine = scanned(job.student, dtype=torch.float32)
    return scanned(job.teacher, dtype=torch.float32) if mine.overflows and job.teacher is not None else mine


def _check_memory(run: TrainingRun) -> None:
    """Raises InputError or UsageError for a training that does not fit into the memory of this machine."""
    if run.device.type != "cpu":
        return
    job = run.job
    batch = job.batch_size * run.data.seq_len // current().size
    need = whole(job.student, job.teacher, job.opened, batch=batch)
    noted_placement(need, budget=run.max_memory, meter=run.meter, what="tuning with the whole model in memory")


# -- a layer at a time -----------------------------------------------------------------------------------------------


def _layerwise(run: TrainingRun) -> JsonObject:
    job = run.job
    assert job.teacher is not None and job.student.family.experts.routing is not None
    training, held = split(run.data, batch_size=job.batch_size)
    world = current()
    if len(training) < world.size:
        raise InputError(
            f"the data fills {counted(len(training), 'sequence')} to train on, fewer than the {world.size} processes",
            hint="Give more text, a smaller --seq-len, or start fewer processes.",
        )
    mine = [windows[world.rank :: world.size] for windows in (training, held)]
    warnings, outcomes = list(job.warnings), []
    start_meter(run.meter, job.teacher, tokens=training.size + held.size)
    layers = each_layer(
        job.student, job.teacher, np.concatenate(mine), batch_size=job.batch_size, device=run.device,
        max_memory=run.max_memory, meter=run.meter, trains_experts="experts" in job.train,
    )  # fmt: skip
    for filled, inputs, outputs in layers:
        with run.recording([filled.block]) as take_routed:
            fit = LayerTraining(
                filled, inputs, outputs, mine[1].size, run.data.seq_len, job.student.family.experts.routing,
                take_routed, job.balance, job.z_loss, run.device, run.disturbance, run.rebalance([filled.block]),
            )  # fmt: skip
            outcome = _fit(run, fit, training=training.size)
        outcomes.append(outcome)
        warnings += _remarks(outcome, f"layer {filled.block.layer}: {_HELD_OUT['layerwise']}")
    loads = [(o.before.load, o.after.load) for o in outcomes]
    block_json = _block(run, outcomes, loads, trained=training, held=held)
    for row, o in zip(block_json["layers"], outcomes):
        row |= {"error": o.after.error, "improved": o.improved}
        row["before"]["error"] = o.before.error
    errors = {
        "error_before": float(np.mean([o.before.error for o in outcomes])),
        "error_after": float(np.mean([o.after.error for o in outcomes])),
    }
    unknown = dict.fromkeys(("loss_before", "loss_after", "kl_before", "kl_after"))  # no logits were computed
    return block_json | unknown | errors | {"warnings": warnings}


def _fit(run: TrainingRun, fit: LayerTraining, *, training: int) -> Outcome[LayerMeasure]:
    """Train one layer on `training` tokens of all processes, and write its tensors."""
    job, layer = run.job, fit.filled.block.layer
    pieces = pieces_of(job.student, job.opened, blocks=[fit.filled.block], named=fit.filled.named, layer=layer)
    size = job.batch_size * run.data.seq_len
    order = batches(training, size, key=(job.seed, "tune", "rows", layer))
    outcome = optimise(
        pieces,
        schedule=job.schedule,
        step=lambda i: fit.step(next(order), number=i),
        measure=lambda: fit.measure(batch=size),
        score=lambda measured: measured.error,
        note=_reporting(run, f"layer {layer}: ", lambda m: f"{_HELD_OUT['layerwise']} {m.error:.4f}"),
        not_finite=lambda: not_finite(job.student, layer, dtype=torch.float32),
    )
    run.put(pieces, outcome.improved)
    return outcome


# -- reporting ---------------------------------------------------------------------------------------------------------

_HELD_OUT = {
    "distill": "held-out KL",
    "lm": "held-out loss",
    "balance": "held-out balance loss",
    "layerwise": "held-out relative error",
}


def _reporting(run: TrainingRun, prefix: str, describe: Callable[[M], str]) -> Callable[[int, float, M | None], None]:
    """A function that reports to the meter: the training loss of every step, every evaluation, and the step at least
    every `_HEARTBEAT` seconds, with the time that is left."""
    began = last = time.monotonic()

    def note(done: int, loss: float, measured: M | None) -> None:
        nonlocal last
        run.meter.figure("training loss", loss * current().size)
        if not prefix and measured is None:  # a model as a whole: the meter counts its steps
            run.meter.advance(1)
        if measured is None and time.monotonic() - last < _HEARTBEAT:
            return
        last = time.monotonic()
        left = (last - began) / done * (run.job.schedule.steps - done)
        words = [f"{prefix}step {done}/{run.job.schedule.steps}", f"training loss {loss * current().size:.4f}"]
        words += [] if measured is None else [describe(measured)]
        run.meter.note("  ".join([*words, f"eta {human_seconds(left)}"]))

    return note


def _remarks(outcome: Outcome[M], figure: str) -> list[str]:
    """The warnings about a training; `figure` names what was measured."""
    remarks = []
    if outcome.diverged_at is not None:
        remarks.append(f"{figure}: training stopped at step {outcome.diverged_at}, because the loss was not finite")
    if outcome.stopped_at is not None:
        remarks.append(f"{figure}: training stopped early at step {outcome.stopped_at}, because it no longer improved")
    if not outcome.improved:
        remarks.append(f"{figure} did not improve, so the tensors of the source are kept (try a lower --learning-rate)")
    return remarks


def _block(
    run: TrainingRun, outcomes: Sequence[Outcome[M]], loads: Sequence[tuple[RoutingLoad, RoutingLoad]], *,
    trained: np.ndarray, held: np.ndarray,
) -> JsonObject:  # fmt: skip
    """The part of the JSON that all objectives share."""
    layers = []
    for before, after in loads:
        was = before.to_json()
        layers.append(after.to_json() | {"before": {k: v for k, v in was.items() if k != "layer"}})
    return {
        "objective": run.job.objective,
        "train": list(run.job.train),
        "steps": run.job.schedule.steps,
        "learning_rate": dict(run.job.schedule.rates),
        "improved": any(o.improved for o in outcomes),
        "layers": layers,
        "tokens": {"trained": int(trained.size), "held_out": int(held.size)},
    }
