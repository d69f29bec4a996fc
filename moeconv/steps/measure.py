"""Steps that only measure or look: inspect, calibrate, evaluate, verify, and the tables of what is supported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moeconv.checkpoint.reader import Checkpoint
from moeconv.checkpoint.target import check_file_target
from moeconv.errors import CheckError, Unsupported, UsageError, escape
from moeconv.families.model import open_model
from moeconv.options import (
    CalibrateOptions,
    DataOptions,
    EvaluateOptions,
    MeasureOptions,
    PlanOptions,
    parameters_of,
    take,
)
from moeconv.plan.meter import Meter
from moeconv.steps.common import open_resolved
from moeconv.steps.hub import resolve


def inspect(source: str) -> dict[str, Any]:
    """What a checkpoint is, from its headers; of one that no step takes, what these alone say."""
    from moeconv.report.inspect import inspect as look
    from moeconv.report.unknown import inspect_unknown

    checkpoint = Checkpoint(resolve(source))
    try:
        return look(open_model(checkpoint))
    except Unsupported as why:
        return inspect_unknown(checkpoint, why)


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


def evaluate(source: str, values: Mapping[str, Any], *, meter: Meter) -> dict[str, Any]:
    """Loss on data, alone or against a reference, with gates."""
    from moeconv.evaluate.run import evaluate as measure

    options = take(EvaluateOptions, values)
    named = parameters_of(options, take(DataOptions, values), take(MeasureOptions, values))
    if options.reference:
        named["reference"] = resolve(options.reference)
    return measure(resolve(source), seed=take(PlanOptions, values).seed, meter=meter, **named)


def failure(result: Mapping[str, Any]) -> CheckError | None:
    """What an evaluation that did not pass ends its command with."""
    from moeconv.evaluate.gates import failure as of

    return of(result)


def verify(source: str, *, against: str | None, load: bool) -> dict[str, Any]:
    """Check every byte of a checkpoint against its manifest, and its structure against its family."""
    from moeconv.report.verify import verify as check

    return check(resolve(source), source=resolve(against) if against else None, load=load)


def report(
    source: str, out: str, *, stats: str | None = None, results: Sequence[Mapping[str, Any]] = (),
    reference: str | None = None, title: str | None = None, overwrite: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Write the HTML report of a checkpoint. `results` are JSON objects of other steps. The JSON: its figures."""
    from moeconv.calibrate.artifact import load_statistics
    from moeconv.checkpoint.writer import replace_file
    from moeconv.report.figures import gather
    from moeconv.report.html import render

    path = Path(out)
    check_report_target(path, overwrite=overwrite)
    model = open_resolved(source)
    figures = gather(
        model,
        statistics=load_statistics(stats) if stats else None,
        results=results,
        reference=open_resolved(reference) if reference else None,
    )
    page = render(figures, title=escape(title or model.checkpoint.path.resolve().name)).encode()
    replace_file(path, page)
    return {"command": "report", "output": out, "bytes": len(page), "figures": figures}


def check_report_target(path: Path, *, overwrite: bool) -> None:
    """Refuse, before any work, a path where a report could not be put. Raises OutputError."""
    from moeconv.report.html import is_report

    check_file_target(path, what="report", reads=(), overwrite=overwrite, replaces=is_report)


def load_results(paths: Sequence[str]) -> list[dict[str, Any]]:
    """The JSON objects that commands printed, from files."""
    from moeconv.report.figures import load_results as load

    return [load(path) for path in paths]


def families() -> dict[str, Any]:
    """The supported families and conversions."""
    from moeconv.families.find import accepted
    from moeconv.families.pairs import PAIRS
    from moeconv.families.wrappers import WRAPPED

    pairs = [{"from": p.source, "to": p.target, "exact": p.exact, "default": p.default, "note": p.note} for p in PAIRS]
    around = {name: sorted(rows) for name, rows in sorted(WRAPPED.items())}
    taken = accepted()
    return {"dense": list(taken["dense"]), "moe": list(taken["moe"]), "multimodal": around, "pairs": pairs}


def formats() -> dict[str, Any]:
    """The quantization formats and which runtime loads them."""
    from moeconv.quantize.formats import BITS, FORMATS

    rows = []
    for f in FORMATS.values():
        kinds = [(scheme, BITS[scheme], f.loads[scheme]) for scheme in f.schemes]
        for scheme, bits, loads in (*kinds, ("mixed bits by layer", None, f.mixed)):
            rows.append(
                {"name": f"{f.name} {scheme}", "format": f.name, "scheme": scheme, "bits": bits, "loads": dict(loads),
                 "notes": dict(f.notes)}
            )  # fmt: skip
    return {"formats": rows}
