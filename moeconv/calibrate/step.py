"""The step calibrate: statistics of a model on data, or of several runs added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moeconv.checkpoint.hub import resolve
from moeconv.errors import UsageError
from moeconv.options import CalibrateOptions, DataOptions, MeasureOptions, PlanOptions, parameters_of, take
from moeconv.plan.meter import Meter


def calibrate(source: str, stats: str, values: Mapping[str, Any], *, overwrite: bool, meter: Meter) -> dict[str, Any]:
    """Run data through a model and write its statistics to a file."""
    from moeconv.calibrate.run import calibrate as measure

    named = parameters_of(take(CalibrateOptions, values), take(DataOptions, values), take(MeasureOptions, values))
    seed = take(PlanOptions, values).seed
    return measure(resolve(source), stats, seed=seed, overwrite=overwrite, meter=meter, **named)


def merge(source: str, stats: str, files: Sequence[str], *, data: Sequence[str], overwrite: bool) -> dict[str, Any]:
    """Add statistics files of a model."""
    from moeconv.calibrate.merge import merge_statistics

    if data:
        raise UsageError("--merge and --data exclude each other", hint="Calibrate on the data first, then merge.")
    return merge_statistics(resolve(source), stats, files, overwrite=overwrite)
