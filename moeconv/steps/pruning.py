"""The prune step: what is measured for a plan (statistics, gates, repaired experts), and the curve over all ratios."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moeconv.checkpoint.output import check_target
from moeconv.checkpoint.reader import SafetensorsFile
from moeconv.checkpoint.writer import output_errors, replace_file
from moeconv.errors import InputError, OutputError, UsageError, escape
from moeconv.families.model import Model, open_model
from moeconv.families.rule import rule_of
from moeconv.options import (
    CalibrateOptions,
    DataOptions,
    MeasureOptions,
    PlanOptions,
    PruneOptions,
    TuneOptions,
    WriteOptions,
    parameters_of,
    parse_size,
    take,
)
from moeconv.plan.execute import default_jobs, execute
from moeconv.plan.meter import Meter, SilentMeter
from moeconv.prune import planner
from moeconv.prune.criteria import CRITERIA, Evidence, Order
from moeconv.steps.common import open_resolved, run_plan

JUDGE_EVERY = 4  # of --data, the share of windows that judge what was decided on the others
PLOTS = (".png", ".svg", ".pdf")
_AT_ONCE = 4  # ratios measured in one pass while a gate is searched
Run = Callable[..., dict[str, Any]]  # as run_plan
_REPAIRS = ("refit", "sequential", "merge", "distill")


def named(values: Mapping[str, Any], *groups: type) -> dict[str, Any]:
    """The values of these groups, as keyword arguments."""
    return {name: value for group in groups for name, value in parameters_of(take(group, values)).items()}


@contextmanager
def scratch() -> Iterator[str]:
    """A temporary directory for what is measured on the way; TMPDIR says where."""
    with output_errors(tempfile.gettempdir()):
        folder = tempfile.TemporaryDirectory(prefix="moeconv-", ignore_cleanup_errors=True)
    with folder as path:
        yield path


def prune(
    source: str, out: str | None, values: Mapping[str, Any], *, meter: Meter, run: Run = run_plan
) -> dict[str, Any]:
    """Remove experts: by statistics, by data that is calibrated on first, or by the weights alone. `run` executes the
    plan that was decided."""
    model = open_resolved(source)
    options, data = take(PruneOptions, values), take(DataOptions, values).data
    write = take(WriteOptions, values)
    parameters = named(values, PruneOptions, PlanOptions)
    parameters["criterion"] = planner.resolve_criterion(
        options.criterion, has_data=bool(options.stats or data), model=model
    )
    measures = [n for n in (*_REPAIRS, "curve") if getattr(options, n)]
    measures += ["max_loss_increase"] if options.max_loss_increase is not None else []
    judged = options.top_k is not None and bool(data)  # what a change of top-k costs
    if measures and not data and not write.dry_run:
        flag = "--" + measures[0].replace("_", "-")
        raise UsageError(f"{flag} runs the model on text", hint="Pass --data FILE, with --stats or without.")
    if options.stats and data and not measures and not judged:
        raise UsageError("--stats and --data exclude each other", hint="Statistics hold what the data gave.")
    if options.merge and not (options.stats or data):
        raise UsageError("--merge needs statistics", hint="Pass --data FILE, or --stats STATS too.")
    if _covers(options) and not (options.stats or data):
        raise UsageError("--protect-coverage needs statistics", hint="Pass --data FILE, or --stats STATS.")
    if options.curve:
        return curve(model, out, values, parameters, meter=meter)
    if out is None:
        raise UsageError("prune needs OUT, the directory to write", hint="Only --curve writes no model.")
    planner.check_prune(model, **parameters)  # before anything is measured
    check_target(Path(os.path.abspath(out)), sources=(model.checkpoint.path,), overwrite=write.overwrite)
    with scratch() as folder:
        if write.dry_run:
            evidence = _evidence(model, options.stats, parameters, jobs=None)
            _settle(model, evidence, options, parameters)
            return run_plan(planner.plan_prune(model, evidence=evidence, **parameters), model, out, values, meter=meter)
        evidence = _gathered(model, values, parameters, folder, meter=meter)
        warnings = _settle(model, evidence, options, parameters)
        keep, extra = _decided(model, evidence, values, parameters, meter=meter)
        if judged and not extra:
            extra = _cost(model, evidence, values, parameters, meter=meter)
        overlays: dict[str, SafetensorsFile] = {}
        groups: Any = None
        if options.sequential or options.refit:
            left = _left(model, evidence, keep, parameters)
            overlays, keep = _repaired(model, evidence, keep, left, values, parameters, folder, meter=meter)
        if options.merge:
            overlays, groups, keep = _merged(model, evidence, keep, values, parameters, folder, meter=meter)
        if options.distill:
            found = _distilled(model, evidence, keep, overlays, values, parameters, folder, meter=meter)
            overlays, extra = overlays | {"tuned": found[0]}, extra | {"distill": found[1]}
        plan = planner.plan_prune(
            model, evidence=evidence, keep_experts=keep, overlays=overlays or None, groups=groups, **parameters
        )
        result = run(plan, model, out, values, meter=meter, origins=overlays or None)
    result["prune"] |= extra
    result["warnings"] += warnings
    return result


def _settle(model: Model, evidence: Evidence, options: PruneOptions, parameters: dict[str, Any]) -> list[str]:
    """Put the default criterion that the evidence allows into `parameters`; a warning where it is the second best."""
    if options.criterion is not None or evidence.statistics is None:
        return []
    parameters["criterion"] = planner.default_criterion(model, evidence)
    if parameters["criterion"] == planner.DEFAULT:
        return []
    return ["the statistics hold no token sample (an older file, or a routing rule that is not known): by saliency"]


# -- evidence ----------------------------------------------------------------------------------------------------------


def _gathered(
    model: Model, values: Mapping[str, Any], parameters: Mapping[str, Any], folder: str, *, meter: Meter
) -> Evidence:
    """Everything that the criterion needs, calibrated or read."""
    options, data = take(PruneOptions, values), take(DataOptions, values).data
    path = options.stats
    if _only_top_k(model, parameters):
        return Evidence(rule=rule_of(model), num_experts=model.num_experts)
    if data and path is None and (CRITERIA[parameters["criterion"]].needs_data or options.merge or _covers(options)):
        from moeconv.calibrate.run import calibrate

        path = os.path.join(folder, "statistics.safetensors")
        judges = options.max_loss_increase is not None or options.curve or options.top_k is not None
        judged = JUDGE_EVERY if judges else None
        calibrate(
            str(model.checkpoint.path), path, seed=take(PlanOptions, values).seed, save_every=None, judge_every=judged,
            meter=meter, **named(values, DataOptions, MeasureOptions, CalibrateOptions),
        )  # fmt: skip
    jobs = take(WriteOptions, values).jobs or default_jobs()
    return _evidence(model, path, parameters, jobs=jobs, meter=meter)


def _only_top_k(model: Model, parameters: Mapping[str, Any]) -> bool:
    """Whether no expert goes."""
    return planner.check_prune(model, **parameters) == model.num_experts


def _covers(options: PruneOptions) -> bool:
    return options.protect_coverage is not None


def _evidence(
    model: Model, path: str | None, parameters: Mapping[str, Any], *, jobs: int | None, meter: Meter | None = None
) -> Evidence:
    """Statistics from a file and, unless `jobs` is None (a dry run), what the criterion reads from the weights."""
    evidence = Evidence(
        statistics=statistics_of(model, path) if path else None, rule=rule_of(model),
        similarity=parameters["similarity"], seed=parameters["seed"], num_experts=model.num_experts,
    )  # fmt: skip
    if jobs is None:
        return evidence
    from moeconv.calibrate import weights

    name = parameters["criterion"]
    alike = name == "redundancy" or parameters["merge"]
    if CRITERIA[name].needs == "weights":
        (meter or SilentMeter()).note("reading the experts' weights")
        evidence = replace(evidence, **{name: getattr(weights, name)(model, jobs=jobs)})
    if alike and evidence.similarity in ("aligned", "raw"):
        (meter or SilentMeter()).note("comparing the experts' weights")
        cosine = weights.weight_cosine(model, aligned=evidence.similarity == "aligned", jobs=jobs)
        evidence = replace(evidence, weight_cosine=cosine)
    return evidence


def statistics_of(model: Model, path: str) -> Any:
    """Statistics that belong to the model. Raises InputError for others."""
    from moeconv.calibrate.artifact import load_statistics

    statistics = load_statistics(path)
    statistics.check_belongs(model)
    return statistics


# -- gates and curves --------------------------------------------------------------------------------------------------


class _Judge:
    """Measures plans of several sizes in one pass over the model's layers."""

    def __init__(
        self, model: Model, evidence: Evidence, values: Mapping[str, Any], *, meter: Meter, whole: bool = False
    ) -> None:
        """`whole`: nothing is decided on the data, so that all of it judges."""
        from moeconv.data.windows import TokenData, split_windows

        self.model, self.evidence, self.options, self.meter = model, evidence, take(PruneOptions, values), meter
        self.measure = take(MeasureOptions, values)
        read = _read(model, values)
        fit: TokenData | None = None
        if not self.options.stats and not whole:
            fit, read = split_windows(read, every=JUDGE_EVERY)
        elif self.options.refit and not whole:
            fit, read = split_windows(read, every=2)  # the statistics come from elsewhere: half fits, half judges
        self.windows, self.source, self.names = read.windows, read.source, [s.name for s in read.sources]
        self.fit: np.ndarray | None = None
        if self.options.refit and fit is not None:
            self.windows = np.concatenate([fit.windows, read.windows])
            self.source = np.concatenate([fit.source, read.source])
            self.fit = np.arange(len(self.windows)) < len(fit.windows)

    def scores(self, keeps: Sequence[Mapping[int, Sequence[int]]]) -> list[Any]:
        """A Score for each keep set, over all sources."""
        from moeconv.evaluate.pruned import score_variants, total
        from moeconv.repair.pruned import Variant

        stream = _stream(self.model, self.windows, self.measure, meter=self.meter)
        refit = _refit(self.options) if self.options.refit else None
        variants = [
            Variant(
                keep=dict(k), refit=refit, top_k=self.options.top_k,
                scale=planner.scales_of(self.model, k, self.evidence, self.options),
            )
            for k in keeps
        ]  # fmt: skip
        scores = score_variants(stream, variants, source=self.source, num_sources=len(self.names), fit=self.fit)
        return [total(of_variant) for of_variant in scores]


def _decided(
    model: Model, evidence: Evidence, values: Mapping[str, Any], parameters: Mapping[str, Any], *, meter: Meter
) -> tuple[dict[int, list[int]] | None, dict[str, Any]]:
    """The keep sets that a gate leaves, with what was measured; None where the planner decides alone."""
    options = take(PruneOptions, values)
    gate = options.max_loss_increase
    if gate is None:
        return None, {}
    orders = planner.orders_of(model, evidence, **parameters)
    assert orders is not None
    protected = planner.protected_experts(model, options, evidence)
    floor = max(options.top_k or model.top_k, max(len(p) for p in protected.values()), 1)
    counts = [left for left in range(floor, model.num_experts) if _feasible(model, left, parameters)]
    judge = _Judge(model, evidence, values, meter=meter)
    measured: dict[int, Any] = {}
    sets: dict[int, dict[int, list[int]]] = {}
    low, high = 0, len(counts)  # counts[high:] pass, counts[:low] do not
    while low < high:
        inside = min(_AT_ONCE, high - low)
        tries = sorted({low + (high - low) * i // inside for i in range(inside)})
        for t in tries:
            sets[t] = planner.choose(
                model, orders, counts[t], evidence=evidence, criterion=parameters["criterion"], protected=protected
            )
        for t, score in zip(tries, judge.scores([sets[t] for t in tries])):
            measured[t] = score
        passing = [t for t in tries if _increase(measured[t]) <= gate]
        failing = [t for t in tries if not _increase(measured[t]) <= gate]
        low = max([low, *(t + 1 for t in failing)])
        high = min([high, *(t for t in passing if t >= low)])
    if low >= len(counts):
        least = _increase(measured[len(counts) - 1]) if counts else math.nan
        raise UsageError(
            f"--max-loss-increase {gate}: removing a single expert per layer already raises the loss by {least:.4f}",
            hint="Allow more, or pass --refit.",
        )
    return sets[low], {"measured": _figures(measured[low])}


def _cost(
    model: Model, evidence: Evidence, values: Mapping[str, Any], parameters: Mapping[str, Any], *, meter: Meter
) -> dict[str, Any]:
    """What the planned experts and --top-k do to the loss on --data."""
    left, keep = planner.check_prune(model, **parameters), dict[int, list[int]]()
    if left != model.num_experts:
        block = planner.plan_prune(model, evidence=evidence, **parameters).block
        keep = {int(layer): list(kept) for layer, kept in block["keep"].items()}
    (score,) = _Judge(model, evidence, values, meter=meter, whole=not keep).scores([keep])
    return {"measured": _figures(score)}


def _figures(score: Any) -> dict[str, Any]:
    return {
        "loss": score.mean("loss"), "reference_loss": score.mean("reference_loss"), "loss_increase": _increase(score),
        "kl": score.mean("kl"), "tokens": score.tokens,
    }  # fmt: skip


def _increase(score: Any) -> float:
    return score.mean("loss") - score.mean("reference_loss")


def _feasible(model: Model, left: int, parameters: Mapping[str, Any]) -> bool:
    sized = dict(parameters) | {"keep": left, "max_loss_increase": None}
    try:
        planner.check_prune(model, **sized)
    except UsageError:
        return False
    return True


def curve(
    model: Model, out: str | None, values: Mapping[str, Any], parameters: dict[str, Any], *, meter: Meter
) -> dict[str, Any]:
    """Loss and KL against the share of experts removed, for nested plans; OUT takes the data or a plot of it."""
    options = take(PruneOptions, values)
    path = None if out is None else Path(out)
    if path is not None and (path.suffix not in (".json", *PLOTS) or path.is_dir()):
        raise UsageError(f"--curve writes no model: {escape(out)} must end in .json, {', '.join(PLOTS)}")
    if path is not None and path.exists() and not take(WriteOptions, values).overwrite:
        raise OutputError(f"{escape(out)} exists already", hint="Remove it, or pass --overwrite.")
    for flag in ("merge", "sequential", "distill"):
        if getattr(options, flag):
            raise UsageError(
                f"--curve and --{flag} exclude each other", hint="It shows plans without, or with --refit."
            )
    for flag in planner.BUDGETS:
        if parameters[flag] is not None:
            raise UsageError("--curve shows every ratio: it takes no budget", hint="Leave out --ratio and its kin.")
    counts = [n for n in range(1, model.num_experts) if _feasible(model, n, parameters)]
    planner.check_prune(model, **(parameters | {"keep": counts[-1] if counts else 0}))  # says why nothing can go
    with scratch() as folder:
        evidence = _gathered(model, values, parameters | {"keep": counts[-1]}, folder, meter=meter)
        warnings = _settle(model, evidence, options, parameters)
        orders = planner.orders_of(model, evidence, **(parameters | {"keep": counts[-1]}))
        assert orders is not None
        protected = planner.protected_experts(model, options, evidence)
        most = max(len(p) for p in protected.values())
        counts = [n for n in counts if n >= most]
        if len(counts) > 16:  # a plot needs no more
            counts = sorted({counts[round(i * (len(counts) - 1) / 15)] for i in range(16)})
        criterion = parameters["criterion"]
        keeps = [
            planner.choose(model, orders, n, evidence=evidence, criterion=criterion, protected=protected, nested=True)
            for n in counts
        ]
        judge = _Judge(model, evidence, values, meter=meter)
        scores = [s for i in range(0, len(keeps), _AT_ONCE) for s in judge.scores(keeps[i : i + _AT_ONCE])]
        sure = _stability(model, evidence, criterion, orders, counts, protected)
    rows = []
    for left, score in sorted(zip(counts, scores), key=lambda pair: -pair[0]):
        sized = parameters | {"keep": left}
        rows.append({
            "ratio": round(1 - left / model.num_experts, 6), "experts": left,
            "bytes": planner.plan_prune(model, **sized).nbytes, "loss": score.mean("loss"),
            "loss_increase": _increase(score), "kl": score.mean("kl"), "stability": sure.get(left),
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


def _stability(
    model: Model, evidence: Evidence, criterion: str, orders: Mapping[int, Order], counts: Sequence[int],
    protected: Mapping[int, frozenset[int]],
) -> dict[int, float]:  # fmt: skip
    """{experts left: share of the kept ones that a bootstrap keeps too}; nothing without a token sample."""
    if not CRITERIA[criterion].needs_data or criterion == "easy-ep":
        return {}
    from moeconv.prune.bootstrap import stability

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
    with output_errors(path):
        figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)


# -- repair ------------------------------------------------------------------------------------------------------------


def _left(
    model: Model, evidence: Evidence, keep: Mapping[int, Sequence[int]] | None, parameters: Mapping[str, Any]
) -> int:
    if keep is not None:
        return len(next(iter(keep.values())))
    return planner.plan_prune(model, evidence=evidence, **parameters).block["experts_after"]


def _read(model: Model, values: Mapping[str, Any]) -> Any:
    """The windows of --data, as calibration draws them."""
    from moeconv.calibrate.run import SEQ_LEN, TOKENS, sequence_length
    from moeconv.data.windows import load_tokens

    measure = take(MeasureOptions, values)
    return load_tokens(
        take(DataOptions, values).data, model.checkpoint.path, tokens=measure.tokens or TOKENS,
        seq_len=sequence_length(model, measure.seq_len, default=SEQ_LEN), seed=take(PlanOptions, values).seed,
        text_field=measure.text_field,
    )  # fmt: skip


def _stream(model: Model, windows: np.ndarray, measure: MeasureOptions, *, meter: Meter) -> Any:
    from moeconv.stream.layers import LayerStream, pick_device, start_meter

    start_meter(meter, model)
    limit = None if measure.max_memory is None else parse_size(measure.max_memory, flag="--max-memory")
    return LayerStream(
        model, windows, device=pick_device(measure.device), batch_size=measure.batch_size, max_memory=limit, meter=meter
    )


def _refit(options: PruneOptions) -> Any:
    from moeconv.repair.refit import Refit

    return Refit(options.refit_strength, options.refit_sweeps)


def _repaired(
    model: Model, evidence: Evidence, keep: Mapping[int, Sequence[int]] | None, left: int, values: Mapping[str, Any],
    parameters: Mapping[str, Any], folder: str, *, meter: Meter,
) -> tuple[dict[str, SafetensorsFile], dict[int, list[int]]]:  # fmt: skip
    """Pass the model once more, each layer on the pruned layers before it: chosen there (--sequential), and refitted
    to the unpruned model's stream (--refit)."""
    from moeconv.repair.pruned import Variant, pruned_pass
    from moeconv.repair.run import repair

    options = take(PruneOptions, values)
    if keep is None and not options.sequential:
        block = planner.plan_prune(model, evidence=evidence, **parameters).block
        keep = {int(layer): kept for layer, kept in block["keep"].items()}
    read = _read(model, values)
    meter.note("refitting the experts" if options.refit else "choosing experts layer by layer")
    stream = _stream(model, read.windows, take(MeasureOptions, values), meter=meter)
    variant = Variant(
        keep={layer: list(kept) for layer, kept in (keep or {}).items()},
        choose=_chooser(model, evidence, left, read, values, parameters) if options.sequential else None,
        refit=_refit(options) if options.refit else None,
        top_k=options.top_k,
    )
    if not options.refit:
        pruned_pass(stream, [variant])
        return {}, {layer: sorted(kept) for layer, kept in variant.keep.items()}
    path = Path(folder) / "refit.safetensors"
    settings = {"method": "refit", "strength": options.refit_strength, "sweeps": options.refit_sweeps}
    repair(stream, read, variant, path, left=left, settings=settings)
    return {"refit": SafetensorsFile(path)}, {layer: sorted(kept) for layer, kept in variant.keep.items()}


class _Fields:
    """Statistics of one layer in memory."""

    def __init__(self, fields: Mapping[str, np.ndarray]) -> None:
        self._fields = fields

    def layer(self, layer: int, field: str) -> np.ndarray:
        if field not in self._fields:
            raise InputError(
                f"layer {layer} has no {field}: its router follows a rule that is not known here",
                hint="Pass --criterion saliency.",
            )
        return self._fields[field]


def _chooser(
    model: Model, evidence: Evidence, left: int, read: Any, values: Mapping[str, Any], parameters: Mapping[str, Any]
) -> Any:
    """Statistics of a layer on what the pruned layers before it give, and the criterion on those."""
    import torch

    from moeconv.calibrate.run import SAMPLE_TOKENS
    from moeconv.calibrate.statistics import layer_statistics

    sample = take(CalibrateOptions, values).sample_tokens or SAMPLE_TOKENS
    options = take(PruneOptions, values)

    def choose(layer: Any, hidden: Any) -> list[int]:
        fields = layer_statistics(
            layer, source=torch.from_numpy(read.source), num_sources=len(read.sources), num_experts=model.num_experts,
            seed=parameters["seed"], sample_tokens=sample, rule=evidence.rule,
            hidden=hidden,
        )  # fmt: skip
        here = replace(evidence, statistics=_Fields(fields), samples={})
        chosen = CRITERIA[parameters["criterion"]]
        protected = planner.protected_experts(_OneLayer(model, layer.index), options, here)  # type: ignore[arg-type]
        order = chosen.order(here, layer.index, protected[layer.index])
        return planner.choose(
            model, {layer.index: order}, left, evidence=here, criterion=chosen.name, protected=protected
        )[layer.index]

    return choose


class _OneLayer:
    """A model that has one MoE layer only, for what is asked layer by layer."""

    def __init__(self, model: Model, layer: int) -> None:
        self.moe_layers, self.num_experts, self.family = (layer,), model.num_experts, model.family


def _merged(
    model: Model, evidence: Evidence, keep: Mapping[int, Sequence[int]] | None, values: Mapping[str, Any],
    parameters: Mapping[str, Any], folder: str, *, meter: Meter,
) -> tuple[dict[str, SafetensorsFile], Any, dict[int, list[int]]]:  # fmt: skip
    from moeconv.repair.merging import merge

    if keep is None:
        block = planner.plan_prune(model, evidence=evidence, **parameters).block
        keep = {int(layer): kept for layer, kept in block["keep"].items()}
    groups = planner.groups_of(model, evidence, keep, take(PruneOptions, values))
    statistics = evidence.statistics
    assert statistics is not None
    saliency = {at: np.asarray(statistics.layer(at, "gate_norm_sum")).sum(axis=0) for at in model.moe_layers}
    read = _read(model, values)
    meter.note("merging the experts")
    path = Path(folder) / "merged.safetensors"
    merge(_stream(model, read.windows, take(MeasureOptions, values), meter=meter), read, groups, saliency, path)
    return {"merged": SafetensorsFile(path)}, groups, {layer: sorted(kept) for layer, kept in keep.items()}


def _distilled(
    model: Model, evidence: Evidence, keep: Any, overlays: Mapping[str, SafetensorsFile], values: Mapping[str, Any],
    parameters: Mapping[str, Any], folder: str, *, meter: Meter,
) -> tuple[SafetensorsFile, dict[str, Any]]:  # fmt: skip
    """Router-KD (arXiv 2603.02217): the pruned model is written to a temporary directory, its routers are trained to
    the unpruned model's logits, and come back as an overlay."""
    from moeconv.tune.run import tune

    plan = planner.plan_prune(
        model, evidence=evidence, keep_experts=keep, overlays=dict(overlays) or None, **parameters
    )
    student = os.path.join(folder, "pruned")
    execute(plan, source=model.checkpoint, out=student, origins=dict(overlays) or None, meter=meter)
    path = os.path.join(folder, "tuned.safetensors")
    asked = named(values, MeasureOptions) | named(values, DataOptions)
    block = tune(
        student, path, seed=parameters["seed"], meter=meter, objective="distill", teacher=str(model.checkpoint.path),
        train="router", steps=take(PruneOptions, values).distill, balance=0.0,
        **{k: v for k, v in asked.items() if k not in parameters_of(TuneOptions())},
    )  # fmt: skip
    open_model(student)
    figures = ("steps", "kl_before", "kl_after", "loss_before", "loss_after", "improved")
    return SafetensorsFile(Path(path)), {name: block[name] for name in figures}
