"""`prune --curve`: loss and KL against the share of experts removed, as rows, JSON or a plot."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moeconv.checkpoint.staging import Measured
from moeconv.checkpoint.strictjson import read_json_object
from moeconv.checkpoint.target import check_file_target, starts_with
from moeconv.checkpoint.writer import replace_file
from moeconv.errors import InputError, UsageError, escape
from moeconv.families.model import Model
from moeconv.options import PruneOptions
from moeconv.plan.meter import Meter
from moeconv.plan.plan import Plan
from moeconv.prune import choice, limits, planner
from moeconv.prune.criteria import CRITERIA, Evidence, Order
from moeconv.prune.decision import decide
from moeconv.prune.evidence import gathered, settled
from moeconv.prune.gates import AT_ONCE, Judge, feasible, increase
from moeconv.requests import PruneRequest
from moeconv.runner.run import scratch

PLOTS = (".png", ".svg", ".pdf")
_MAKER = "moeconv prune --curve"  # what a plot says of itself


def curve(model: Model, request: PruneRequest, *, named: bool, meter: Meter) -> dict[str, Any]:
    """Loss and KL against the share of experts removed, for nested plans; OUT takes the data or a plot of it.

    `named`: the user named the criterion."""
    options, out = request.prune, request.out
    path = None if out is None else Path(out)
    if path is not None and (path.suffix not in (".json", *PLOTS) or os.path.isdir(path)):
        raise UsageError(f"--curve writes no model: {escape(out)} must end in .json, {', '.join(PLOTS)}")
    if path is not None:
        check_file_target(
            path, what="curve", reads=[("the model", model.checkpoint.path)],
            overwrite=request.write.overwrite, replaces=is_curve,
        )  # fmt: skip
    for flag in ("merge", "sequential", "distill"):
        if getattr(options, flag):
            raise UsageError(
                f"--curve and --{flag} exclude each other", hint="It shows plans without, or with --refit."
            )
    for flag in limits.BUDGETS:
        if getattr(options, flag) is not None:
            raise UsageError(
                "--curve shows every ratio, so it takes no budget",
                hint="Leave out --ratio, --keep and the other budgets.",
            )
    counts = [n for n in range(1, model.num_experts) if feasible(model, n, options)]
    # says why nothing can go
    limits.check_prune(model, replace(options, keep=counts[-1] if counts else 0), request.plan)
    with scratch() as folder, Measured(Path(folder) / "curve", key=lambda: "curve", note=meter.note) as measured:
        evidence = gathered(model, request, measured, left=counts[-1], meter=meter)
        request, warnings = settled(model, evidence, request, named=named)
        options = request.prune
        orders = choice.orders_of(model, evidence, options, seed=request.plan.seed)
        assert orders is not None
        protected = choice.protected_experts(model, options, evidence)
        most = max(len(p) for p in protected.values())
        counts = [n for n in counts if n >= most]
        if len(counts) > 16:  # a plot needs no more
            counts = sorted({counts[round(i * (len(counts) - 1) / 15)] for i in range(16)})
        criterion = str(options.criterion)
        keeps = [
            choice.choose(model, orders, n, evidence=evidence, criterion=criterion, protected=protected, nested=True)
            for n in counts
        ]
        judge = Judge(model, evidence, request, meter=meter)
        scores = [s for i in range(0, len(keeps), AT_ONCE) for s in judge.scores(keeps[i : i + AT_ONCE])]
        sure = _stability(model, evidence, criterion, orders, counts, protected)
    rows = []
    for left, score in sorted(zip(counts, scores), key=lambda pair: -pair[0]):
        sized = replace(options, keep=left)
        rows.append({
            "ratio": round(1 - left / model.num_experts, 6), "experts": left,
            "bytes": _planned(model, sized, request).nbytes, "loss": score.mean("loss"),
            "loss_increase": increase(score), "kl": score.mean("kl"), "stability": sure.get(left),
        })  # fmt: skip
    result = {
        "command": "prune", "output": out, "dry_run": False, "criterion": criterion, "refit": options.refit,
        "reference_loss": scores[0].mean("reference_loss"), "tokens": scores[0].tokens, "curve": rows,
        "keep": {str(layer): list(order.experts) for layer, order in orders.items()}, "warnings": warnings,
    }  # fmt: skip
    result["removal_order"] = result.pop("keep")
    if path is not None:
        _draw(result, path) if path.suffix in PLOTS else replace_file(path, json.dumps(result, indent=2).encode())
    return result


def _planned(model: Model, options: PruneOptions, request: PruneRequest) -> Plan:
    """The plan of a number of experts, whichever they are."""
    decision = decide(model, options, Evidence(), left=options.keep, seed=request.plan.seed)
    return planner.prune_plan(model, options, request.plan, decision, evidence=Evidence())


def is_curve(path: Path) -> bool:
    """Whether a file holds what `prune --curve` writes: its data, or a plot of them."""
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
    """{experts left: share of the kept ones that a bootstrap keeps too}; nothing without a token sample."""
    from moeconv.prune.bootstrap import can_resample, stability

    if not can_resample(CRITERIA[criterion].needs):
        return {}
    removed = [model.num_experts - n for n in counts]
    try:
        found = stability(evidence, criterion, orders, removed, protected=protected)
    except InputError:  # statistics whose router's rule is not known
        return {}
    return {model.num_experts - count: share for count, share in found.items()}


def _draw(result: Mapping[str, Any], path: Path) -> None:
    """The curve as a picture."""
    try:
        import matplotlib
    except ImportError:
        raise InputError(
            "a plot needs matplotlib", hint="pip install matplotlib, or give OUT the ending .json."
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["curve"]
    figure, axis = pyplot.subplots(figsize=(6, 4))
    for key, label in (("loss_increase", "loss increase"), ("kl", "KL to the unpruned model")):
        axis.plot([r["ratio"] for r in rows], [r[key] for r in rows], marker="o", label=label)
    axis.set(xlabel="share of the experts removed", ylabel="nats per token", title=result["criterion"])
    axis.grid(alpha=0.3)
    axis.legend()
    picture, key = io.BytesIO(), "Software" if path.suffix == ".png" else "Creator"
    figure.savefig(picture, format=path.suffix[1:], bbox_inches="tight", metadata={key: _MAKER})
    pyplot.close(figure)
    replace_file(path, picture.getvalue())
