"""`moeconv report` from start to end: one HTML page about a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moeconv.checkpoint.target import check_file_target
from moeconv.errors import UsageError, escape
from moeconv.families.model import Model
from moeconv.plan.meter import Meter, SilentMeter
from moeconv.requests import ReportRequest
from moeconv.runner.run import open_resolved
from moeconv.types import JsonObject

if TYPE_CHECKING:
    from moeconv.report.types import ReportResult, SampleRow


def report(
    source: str, out: str, *, stats: str | None = None, results: Sequence[Mapping[str, object]] = (),
    reference: str | None = None, title: str | None = None, overwrite: bool = False, markdown: bool = False,
    card: bool = False, samples: bool = False, prompts: str | None = None, meter: Meter | None = None,
) -> ReportResult:  # fmt: skip
    """Write the HTML report of a checkpoint to `out`, and with `markdown` its summary beside it, as .md.

    With `samples` the page has what the model, and before it `reference`, write after the prompts in the file
    `prompts`, or after default ones. With `card` the answers to tasks in `results` are written into the checkpoint's
    model card.

    `results` are JSON objects of other steps. Returns the JSON of the command. Raises OutputError where `out` cannot be
    written, UsageError for prompts without `samples`, InputError for statistics of another model, for a card without
    results or that cannot be read, and for samples of a model that cannot write them.
    """
    from moeconv.calibrate.artifact import load_statistics
    from moeconv.checkpoint.writer import replace_file
    from moeconv.report.figures import flatten, gather
    from moeconv.report.html import render
    from moeconv.report.markdown import is_markdown_report, render_markdown
    from moeconv.report.model_index import add_to_card

    if prompts is not None and not samples:
        raise UsageError("--prompts needs --samples", hint="Pass --samples as well.")
    path = Path(out)
    check_report_target(path, overwrite=overwrite)
    beside = path.with_suffix(".md")
    if markdown:
        check_file_target(beside, what="report", reads=(), overwrite=overwrite, replaces=is_markdown_report)
    model = open_resolved(source)
    other = open_resolved(reference) if reference else None
    statistics = load_statistics(stats) if stats else None
    figures = gather(model, statistics=statistics, results=results, reference=other)
    if samples:
        figures["samples"] = _samples(model, other, prompts, meter=meter or SilentMeter())
    name = escape(title or model.checkpoint.path.resolve().name)
    page = render(figures, title=name).encode()
    changed = add_to_card(model, flatten(results), title=name) if card else None
    replace_file(path, page)
    made: ReportResult = {"command": "report", "output": out, "bytes": len(page), "figures": figures}
    if markdown:
        replace_file(beside, render_markdown(figures, title=name).encode())
        made["markdown"] = str(beside)
    if changed is not None:
        made["card"] = changed
    return made


def report_page(request: ReportRequest, *, meter: Meter) -> ReportResult:
    """`moeconv report`."""
    asked = request.report
    meter.note("reading what was measured")
    return report(
        request.model, request.out, stats=asked.stats, results=load_results(asked.results), reference=asked.reference,
        title=asked.title, overwrite=request.artifact.overwrite, markdown=asked.markdown,
        card=asked.card, samples=asked.samples, prompts=asked.prompts, meter=meter,
    )  # fmt: skip


def _samples(model: Model, reference: Model | None, prompts: str | None, *, meter: Meter) -> list[SampleRow]:
    """One row per prompt: what the reference and the model write."""
    from moeconv.evaluate.samples import read_prompts, write_samples

    asked = read_prompts(prompts)
    meter.note("writing samples")
    before = write_samples(reference, asked, meter=meter) if reference is not None else []
    after = write_samples(model, asked, meter=meter)
    return [
        {
            "prompt": _printable(prompt), "before": _printable(before[i]["text"]) if before else None,
            "after": _printable(after[i]["text"]), "cut": any(side[i]["cut"] for side in (before, after) if side),
        }
        for i, prompt in enumerate(asked)
    ]  # fmt: skip


def _printable(text: str) -> str:
    """Text whose other control characters than line ends are escapes."""
    return "\n".join(map(escape, text.splitlines())).strip("\n")


def check_report_target(path: Path, *, overwrite: bool) -> None:
    """Check, before any work, that a report can be written to `path`. Raises OutputError."""
    from moeconv.report.html import is_report

    check_file_target(path, what="report", reads=(), overwrite=overwrite, replaces=is_report)


def load_results(paths: Sequence[str]) -> list[JsonObject]:
    """The JSON objects that commands printed, read from files. Raises InputError for anything else."""
    from moeconv.report.figures import load_results as load

    return [load(path) for path in paths]
