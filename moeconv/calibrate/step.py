"""The step `calibrate`: it measures the statistics of a model on data, or adds those of several runs."""

from __future__ import annotations

from pathlib import Path

from moeconv.calibrate.need import run_of
from moeconv.checkpoint.hub import resolve
from moeconv.errors import UsageError
from moeconv.options import parameters_of
from moeconv.plan.meter import Meter
from moeconv.requests import CalibrateRequest
from moeconv.runner.run import open_resolved, planned_memory
from moeconv.stream.need import need_of
from moeconv.types import JsonObject


def calibrate(request: CalibrateRequest, *, meter: Meter) -> JsonObject:
    """Run data through a model and write its statistics to a file, or add the files of several runs."""
    imatrix = request.imatrix.imatrix
    if (request.stats is None) == (imatrix is None):
        given = "STATS and --imatrix exclude each other" if imatrix else "no output file was given"
        raise UsageError(given, hint="Give STATS for statistics, or --imatrix FILE for llama.cpp's importance matrix.")
    if request.merge.merge:
        return _merge(request)
    if request.dry.dry_run:
        return _dry_run(request)
    if imatrix is not None:
        return _importance_matrix(request, imatrix, meter)
    assert request.stats is not None
    from moeconv.calibrate.run import calibrate as measure

    return measure(
        resolve(request.model),
        request.stats,
        seed=request.random.seed,
        overwrite=request.artifact.overwrite,
        meter=meter,
        **parameters_of(request.calibrate, request.data, request.measure),
    )


def _importance_matrix(request: CalibrateRequest, path: str, meter: Meter) -> JsonObject:
    from moeconv.quantize.gguf.measure_imatrix import write_imatrix

    return write_imatrix(
        resolve(request.model), Path(path), data=request.data, measure=request.measure, seed=request.random.seed,
        overwrite=request.artifact.overwrite, meter=meter,
    )  # fmt: skip


def _dry_run(request: CalibrateRequest) -> JsonObject:
    """The memory that the command will take."""
    model = open_resolved(request.model)
    run = run_of(model, request.measure, sample_tokens=request.calibrate.sample_tokens)
    planned = {"command": "calibrate", "output": request.stats or request.imatrix.imatrix, "dry_run": True}
    return planned | planned_memory(need_of(model, run), run, request.measure)


def _merge(request: CalibrateRequest) -> JsonObject:
    from moeconv.calibrate.merge import merge_statistics

    if request.stats is None:
        raise UsageError(
            "--merge adds up statistics, which --imatrix does not write", hint="Give STATS in place of --imatrix."
        )
    if request.data.data:
        raise UsageError(
            "--merge and --data exclude each other",
            hint="First calibrate on the data into a file of its own, then merge the files.",
        )
    return merge_statistics(
        resolve(request.model), request.stats, request.merge.merge, overwrite=request.artifact.overwrite
    )
