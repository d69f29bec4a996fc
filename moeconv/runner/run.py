"""Shared by all steps that write a checkpoint: opening MODEL, running a plan, and the common JSON fields."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from moeconv import __version__
from moeconv.checkpoint.card import CARD_NAME
from moeconv.checkpoint.hub import resolve
from moeconv.checkpoint.reader import Checkpoint
from moeconv.checkpoint.staging import Measured
from moeconv.checkpoint.strictjson import canonical_json
from moeconv.checkpoint.target import check_target
from moeconv.checkpoint.writer import output_errors
from moeconv.data.windows import sequence_length
from moeconv.families.model import Model, open_model
from moeconv.options import SEQ_LEN, TOKENS, MeasureOptions, WriteOptions, parameters_of, parse_size
from moeconv.plan.execute import checked_jobs, companions_of, execute, parse_part, peak_rss_bytes
from moeconv.plan.flow import ByteSource
from moeconv.plan.limits import check_limits
from moeconv.plan.memory import free_memory
from moeconv.plan.meter import Meter
from moeconv.plan.plan import Plan
from moeconv.report.card import model_card
from moeconv.stream.need import Need, Workload, WorkloadFields
from moeconv.types import Config, JsonObject
from moeconv.units import human_bytes


def open_resolved(model: str) -> Model:
    """`open_model` on MODEL, which may be a name on the hub (hf://OWNER/NAME)."""
    return open_model(resolve(model))


def run_plan(
    plan: Plan,
    model: Model,
    out: str,
    write: WriteOptions,
    *,
    meter: Meter,
    origins: Mapping[str, ByteSource] | None = None,
    check: Callable[[Path], Config] | None = None,
    figures: Config | None = None,
    measured: Measured | None = None,
) -> JsonObject:
    """Execute a plan with the options `write`, or with dry_run only describe it. Returns the JSON of the step.

    `origins` are the sources of bytes beside `model`, by the names that the plan uses. `check` is called with the
    staged directory before it becomes OUT, and returns what it measured. `figures` were measured before the plan was
    made; the model card shows both. `measured` holds the lock of OUT's staging directory, if it was taken already.

    Raises OutputError where OUT cannot be written, CheckError where `check` fails, InputError for a damaged source.
    """
    result = planned_json(plan, out, dry_run=write.dry_run)
    part = parse_part(write.part)
    checked_jobs(write.jobs)
    if write.dry_run:
        check_out(out, model, write)
        check_limits(plan)
        result["warnings"] += companions_of(plan, model.checkpoint).warnings
        return result

    def describe(steps: list[JsonObject], found: Config) -> dict[str, bytes]:
        siblings = [origin for origin in (origins or {}).values() if isinstance(origin, Checkpoint)]
        return {CARD_NAME: model_card(plan, model.checkpoint, steps, {**(figures or {}), **found}, siblings)}

    done = execute(
        plan,
        source=model.checkpoint,
        out=out,
        origins=origins,
        check=None if write.no_check else check,
        describe=describe,
        jobs=write.jobs,
        part=part,
        overwrite=write.overwrite,
        strict=write.strict,
        meter=meter,
        lock=None if measured is None else measured.lock,
    )
    result |= {"seconds": round(done.seconds, 3), "peak_rss_bytes": done.peak_rss_bytes, "files": dict(done.files)}
    result["warnings"] += done.warnings + list(done.extra.get("warnings", ()))
    result[plan.command] |= {k: v for k, v in done.extra.items() if k != "warnings"}
    if part is not None:
        result |= {"part": write.part, "complete": done.complete}
    return result


def check_out(out: str, model: Model, write: WriteOptions) -> None:
    """Check, before any work, that OUT can be written with the options `write`. Raises OutputError."""
    reads = [("the source", model.checkpoint.path)]
    check_target(Path(out), reads=reads, overwrite=write.overwrite)


def planned_memory(need: Need, run: Workload, measure: MeasureOptions) -> JsonObject:
    """For a dry run: the memory that running the model on data will take, and a warning if that is more than is free.
    Returns the keys `memory` (peak_bytes, least_bytes, free_bytes, tokens) and `warnings`."""
    free = free_memory()
    memory = {"peak_bytes": need.peak(held=True, in_file=False), "least_bytes": need.least, "free_bytes": free}
    limit = free if measure.max_memory is None else parse_size(measure.max_memory, flag="--max-memory")
    text = f"measuring takes at least {human_bytes(need.least)} of memory; {human_bytes(limit)} are free or allowed"
    return {"memory": memory | {"tokens": run.tokens}, "warnings": [text] if need.least > limit else []}


def run_on_data(model: Model, measure: MeasureOptions, asks: WorkloadFields) -> Workload:
    """The workload of a step that measures, for data with as many tokens as it reads. `asks` are further fields of
    it."""
    length = sequence_length(model, measure.seq_len, default=SEQ_LEN)
    return Workload(measure.tokens or TOKENS, length, measure.batch_size, **asks)


def planned_json(plan: Plan, out: str, *, dry_run: bool) -> JsonObject:
    """The fields of the JSON that the plan alone decides."""
    return {
        "command": plan.command,
        "output": out,
        "plan_id": plan.plan_id,
        "dry_run": dry_run,
        "tensors": plan.tensors,
        "shards": len(plan.shards),
        "bytes": plan.nbytes,
        "parameters": {"total": plan.params_total, "active": plan.params_active},
        "changed": plan.changed,
        "seconds": 0.0,
        "peak_rss_bytes": peak_rss_bytes(),
        "warnings": list(plan.warnings),
        "files": {},
        plan.command: dict(plan.block),
    }


def measuring(command: str, model: Model, out: str, write: WriteOptions, *options: object, meter: Meter) -> Measured:
    """The place where a command stores what it measures before it plans, for its other parts and for later runs.

    `options` are the option groups that decide what is measured. For the files that they name, the content is compared
    and not the path.
    """
    from moeconv.data.digest import content_of

    shared = parse_part(write.part) is not None
    checked_jobs(write.jobs)

    def key() -> str:
        asked = JsonObject(parameters_of(*options))
        asked |= {"data": [content_of(value) for value in asked.get("data", ())]}
        if asked.get("stats"):
            asked["stats"] = content_of(asked["stats"], flag="--stats")
        if asked.get("teacher"):
            teacher = open_resolved(asked["teacher"])
            asked["teacher"] = [teacher.identity, teacher.checkpoint.resume_state()]
        state = [__version__, command, model.identity, model.checkpoint.resume_state(), asked]
        return hashlib.sha256(canonical_json(state)).hexdigest()

    return Measured(Path(os.path.abspath(out)), key=key, shared=shared, note=meter.note)


@contextmanager
def scratch() -> Iterator[str]:
    """A temporary directory for intermediate measurements, under TMPDIR. Raises OutputError if it cannot be made."""
    with output_errors(tempfile.gettempdir()):
        folder = tempfile.TemporaryDirectory(prefix="moeconv-", ignore_cleanup_errors=True)
    with folder as path:
        yield path
