"""`prune --curve`: loss and KL against the share of experts removed, as rows, JSON or a plot."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moeconv.checkpoint.staging import Measured
from moeconv.checkpoint.strictjson import read_json_object
from moeconv.checkpoint.target import check_file_target, starts_with
from moeconv.checkpoint.writer import replace_file
from moeconv.contract import Curve, CurveRow
from moeconv.errors import InputError, UsageError, escape
from moeconv.families.model import Model
from moeconv.options import PlanOptions, PruneOptions
from moeconv.plan.meter import Meter
from moeconv.prune import choice, limits
from moeconv.prune.criteria import CRITERIA, Evidence, Order
from moeconv.prune.evidence import gathered, with_criterion
from moeconv.prune.gates import AT_ONCE, KeepScorer, increase
from moeconv.prune.points import ENDS, Point, points
from moeconv.prune.width import check_width
from moeconv.requests import PruneRequest
from moeconv.runner.run import scratch

if TYPE_CHECKING:
    from moeconv.prune.scores import Score

_MIX_RATIOS = 7  # of --curve --mix
PLOTS = (".png", ".svg", ".pdf")
_MAKER = "moeconv prune --curve"  # the metadata by which a plot is recognised


def curve(model: Model, request: PruneRequest, *, named: bool, meter: Meter) -> Curve:
    """Measure loss and KL against the share of experts removed, for nested sets of kept experts. OUT gets the data as
    JSON, or a plot of them. `named`: the user named the criterion.

    Raises UsageError for options that do not go with --curve, and what the measurements raise.
    """
    path = _checked_out(model, request)
    _check_options(request.prune)
    options = request.prune
    counts = [n for n in range(1, model.num_experts) if limits.feasible(model, n, options)]
    # for a model of which no expert can be removed, this raises the reason
    some = replace(options, keep=counts[-1] if counts else 0, curve=False, mix=None, multiple=None)
    limits.check_prune(model, some, request.plan)
    check_width(model, options)
    with scratch() as folder, Measured(Path(folder) / "curve", key=lambda: "curve", note=meter.note) as measured:
        evidence = gathered(model, request, measured, left=counts[-1], meter=meter)
        request, warnings = with_criterion(model, evidence, request, named=named)
        options, criterion = request.prune, str(request.prune.criterion)
        orders = choice.orders_of(model, evidence, options, seed=request.plan.seed)
        assert orders is not None
        protected = choice.protected_experts(model, options, evidence)
        counts = _spread([n for n in counts if n >= max(len(p) for p in protected.values())])
        tries = _points(model, options, request.plan, counts)
        keeps = [
            _whole(model) if left == model.num_experts
            else choice.choose(
                model, orders, left, evidence=evidence, criterion=criterion, protected=protected, nested=True
            )
            for left, _ in tries
        ]  # fmt: skip
        widths = [None if width == model.expert_width else width for _, width in tries]
        scorer = KeepScorer(model, evidence, request, meter=meter)
        scores = [
            score for i in range(0, len(keeps), AT_ONCE)
            for score in scorer.scores(keeps[i : i + AT_ONCE], widths=widths[i : i + AT_ONCE] if options.mix else None)
        ]  # fmt: skip
        removed = sorted({left for left, _ in tries} - {model.num_experts}, reverse=True)
        stability = _stability(model, evidence, criterion, orders, removed, protected)
    of_all = sorted(zip(tries, scores), key=lambda pair: (-pair[0][0] * pair[0][1], pair[0]))
    result: Curve = {
        "command": "prune", "output": request.out, "dry_run": False, "criterion": criterion, "refit": options.refit,
        "reference_loss": scores[0].mean("reference_loss"), "tokens": scores[0].tokens,
        "curve": [_row(model, request, point, score, stability.get(point[0])) for point, score in of_all],
        "warnings": warnings,
        "removal_order": {str(layer): list(order.experts) for layer, order in orders.items()},
    }  # fmt: skip
    if path is not None:
        _draw(result, path) if path.suffix in PLOTS else replace_file(path, json.dumps(result, indent=2).encode())
    return result


def _checked_out(model: Model, request: PruneRequest) -> Path | None:
    """OUT, the file to write; None without one. Raises UsageError or OutputError for a path that cannot be used."""
    if request.out is None:
        return None
    path = Path(request.out)
    if path.suffix not in (".json", *PLOTS) or os.path.isdir(path):
        raise UsageError(
            f"--curve writes data or a plot, and no model: {escape(request.out)} ends in none of .json, "
            f"{', '.join(PLOTS)}",
            hint="Give OUT one of these endings.",
        )
    check_file_target(
        path, what="curve", reads=[("the model", model.checkpoint.path)],
        overwrite=request.write.overwrite, replaces=is_curve,
    )  # fmt: skip
    return path


def _check_options(options: PruneOptions) -> None:
    for flag in ("merge", "sequential", "distill"):
        if getattr(options, flag):
            raise UsageError(
                f"--curve and --{flag} exclude each other",
                hint=f"Leave out --{flag}. The curve shows prunes without a repair, or with --refit.",
            )
    for flag in limits.BUDGETS:
        if getattr(options, flag) is not None:
            raise UsageError(
                "--curve shows every ratio, so it takes no budget",
                hint="Leave out --ratio, --keep and the other budgets.",
            )


def _spread(counts: list[int]) -> list[int]:
    """At most 16 of the counts, evenly spread, with the first and the last: a plot needs no more points."""
    most = 16
    if len(counts) <= most:
        return counts
    return sorted({counts[round(i * (len(counts) - 1) / (most - 1))] for i in range(most)})


def _points(model: Model, options: PruneOptions, common: PlanOptions, counts: list[int]) -> list[Point]:
    """The (experts, neurons) that are measured: those counts of experts or, with --mix, a few mixes for some ratios."""
    if options.mix is None:
        return [(left, model.expert_width) for left in counts]
    found: list[Point] = []
    for step in range(1, _MIX_RATIOS + 1):
        with contextlib.suppress(UsageError):  # neither so few experts nor so few neurons are possible
            found += points(model, options, common, ratio=step / (_MIX_RATIOS + 1), shares=ENDS)
    return list(dict.fromkeys(found))


def _whole(model: Model) -> dict[int, list[int]]:
    return {layer: list(range(model.num_experts)) for layer in model.moe_layers}


def _row(model: Model, request: PruneRequest, point: Point, score: Score, stability: float | None) -> CurveRow:
    left, width = point
    narrower = None if width == model.expert_width else width
    row: CurveRow = {
        "ratio": round(1 - left * width / (model.num_experts * model.expert_width), 6), "experts": left,
        "bytes": limits.planned_bytes(model, request.plan, left, narrower), "loss": score.mean("loss"),
        "loss_increase": increase(score), "kl": score.mean("kl"), "stability": stability,
    }  # fmt: skip
    if request.prune.mix is not None:
        row["width"] = width
        row["removes"] = "experts" if narrower is None else "neurons" if left == model.num_experts else "both"
    return row


def is_curve(path: Path) -> bool:
    """Whether a file was written by `prune --curve`: its data, or a plot of them. Only such a file is overwritten."""
    if path.suffix in PLOTS:
        return starts_with(path, *((begin, _MAKER.encode()) for begin in (b"\x89PNG", b"<?xml", b"%PDF")))
    try:
        value = read_json_object(path, what=escape(path))
    except InputError:
        return False
    return value.get("command") == "prune" and isinstance(value.get("curve"), list)


def _stability(
    model: Model, evidence: Evidence, criterion: str, orders: Mapping[int, Order], counts: Sequence[int],
    protected: Mapping[int, frozenset[int]],
) -> dict[int, float]:  # fmt: skip
    """{experts left: share of the kept experts that resampled tokens keep too}; empty without a token sample."""
    from moeconv.prune.bootstrap import can_resample, stability

    if not can_resample(CRITERIA[criterion].needs):
        return {}
    removed = [model.num_experts - n for n in counts]
    try:
        found = stability(evidence, criterion, orders, removed, protected=protected)
    except InputError:  # the statistics hold no token sample: the rule of the router is not known
        return {}
    return {model.num_experts - count: share for count, share in found.items()}


def lines_of(rows: Sequence[CurveRow]) -> list[tuple[str, list[CurveRow]]]:
    """The points of a curve, those that remove the same as one line: (what they remove, in words; the points)."""
    kinds = list(dict.fromkeys(row.get("removes") for row in rows))
    words = {"both": ", experts and neurons", None: ""}
    return [(words.get(kind, f", {kind} alone"), [row for row in rows if row.get("removes") == kind]) for kind in kinds]


def _draw(result: Curve, path: Path) -> None:
    """Write the curve as a plot."""
    try:
        import matplotlib
    except ImportError:
        raise InputError(
            "a plot needs the package matplotlib", hint="Run pip install matplotlib, or give OUT the ending .json."
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4))
    for word, rows in lines_of(result["curve"]):
        ratios = [row["ratio"] for row in rows]
        axis.plot(ratios, [row["loss_increase"] for row in rows], marker="o", label="loss increase" + word)
        axis.plot(ratios, [row["kl"] for row in rows], marker="o", label="KL to the unpruned model" + word)
    what = "experts' weights" if "removes" in result["curve"][0] else "experts"
    axis.set(xlabel=f"share of the {what} removed", ylabel="nats per token", title=result["criterion"])
    axis.grid(alpha=0.3)
    axis.legend()
    picture, key = io.BytesIO(), "Software" if path.suffix == ".png" else "Creator"
    figure.savefig(picture, format=path.suffix[1:], bbox_inches="tight", metadata={key: _MAKER})
    pyplot.close(figure)
    replace_file(path, picture.getvalue())
