"""What mends a pruned model before it is written: experts refitted, merged or chosen anew, distilled routers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from moeconv.checkpoint.overlay import Overlay
from moeconv.errors import InputError
from moeconv.families.model import Model
from moeconv.options import (
    CalibrateOptions,
    DataOptions,
    MeasureOptions,
    PruneOptions,
    TuneOptions,
    parameters_of,
    take,
)
from moeconv.plan.execute import execute
from moeconv.plan.meter import Meter
from moeconv.prune import choice, planner
from moeconv.prune.criteria import CRITERIA, Evidence
from moeconv.prune.windows import read_windows, refit_of, stream_of
from moeconv.runner.run import named

REPAIRS = ("refit", "sequential", "merge", "distill")


def left_of(
    model: Model, evidence: Evidence, keep: Mapping[int, Sequence[int]] | None, parameters: Mapping[str, Any]
) -> int:
    """How many experts stay in each layer."""
    if keep is not None:
        return len(next(iter(keep.values())))
    return planner.plan_prune(model, evidence=evidence, **parameters).block["experts_after"]


def repaired(
    model: Model, evidence: Evidence, keep: Mapping[int, Sequence[int]] | None, left: int, values: Mapping[str, Any],
    parameters: Mapping[str, Any], folder: str, *, meter: Meter,
) -> tuple[dict[str, Overlay], dict[int, list[int]], dict[str, Any]]:  # fmt: skip
    """Pass the model once more, each layer on the pruned layers before it: chosen there (--sequential), and refitted
    to the unpruned model's stream (--refit). Returns the overlays, what is kept, and how the refit fared."""
    from moeconv.prune.repair.pruned import Variant, pruned_pass
    from moeconv.prune.repair.run import repair

    options = take(PruneOptions, values)
    if keep is None and not options.sequential:
        block = planner.plan_prune(model, evidence=evidence, **parameters).block
        keep = {int(layer): kept for layer, kept in block["keep"].items()}
    read = read_windows(model, values)
    meter.note("refitting the experts" if options.refit else "choosing experts layer by layer")
    stream = stream_of(model, read.windows, take(MeasureOptions, values), meter=meter)
    variant = Variant(
        keep={layer: list(kept) for layer, kept in (keep or {}).items()},
        choose=_chooser(model, evidence, left, read, values, parameters) if options.sequential else None,
        refit=refit_of(options) if options.refit else None,
        top_k=options.top_k,
    )
    if not options.refit:
        pruned_pass(stream, [variant])
        return {}, {layer: sorted(kept) for layer, kept in variant.keep.items()}, {}
    path = Path(folder) / "refit"
    settings = {"method": "refit", "strength": options.refit_strength, "sweeps": options.refit_sweeps}
    repair(stream, read, variant, path, left=left, settings=settings)
    kept = {layer: sorted(kept) for layer, kept in variant.keep.items()}
    return {"refit": Overlay(path)}, kept, {"refit": {"layers": [asdict(f) for f in variant.fitted]}}


def remarks_on(extra: Mapping[str, Any]) -> list[str]:
    """Warnings of a refit: too little text, and layers that stay as they were cut."""
    from moeconv.data.heldout import few_tokens, layers_in_words

    layers = extra.get("refit", {}).get("layers", [])
    warnings = few_tokens({row["layer"]: row["tokens_per_expert"] for row in layers}, what="--refit")
    back = [row["layer"] for row in layers if not row["kept"]]
    if back:
        warnings.append(
            f"--refit: {layers_in_words(back)} keep the weights that they had, because the refitted ones err more on "
            "held-out tokens"
        )
    return warnings


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

    from moeconv.calibrate.sample import sample_size
    from moeconv.calibrate.statistics import layer_statistics

    sample = take(CalibrateOptions, values).sample_tokens or sample_size(
        read.tokens, top_k=model.top_k, num_experts=model.num_experts
    )
    options = take(PruneOptions, values)

    def choose(layer: Any, hidden: Any) -> list[int]:
        fields = layer_statistics(
            layer, source=torch.from_numpy(read.source), num_sources=len(read.sources), num_experts=model.num_experts,
            seed=parameters["seed"], sample_tokens=sample, rule=evidence.rule,
            hidden=hidden,
        )  # fmt: skip
        here = replace(evidence, statistics=_Fields(fields), samples={})
        chosen = CRITERIA[parameters["criterion"]]
        protected = choice.protected_experts(_OneLayer(model, layer.index), options, here)  # type: ignore[arg-type]
        order = chosen.order(here, layer.index, protected[layer.index])
        return choice.choose(
            model, {layer.index: order}, left, evidence=here, criterion=chosen.name, protected=protected
        )[layer.index]

    return choose


class _OneLayer:
    """A model that has one MoE layer only, for what is asked layer by layer."""

    def __init__(self, model: Model, layer: int) -> None:
        self.moe_layers, self.num_experts, self.family = (layer,), model.num_experts, model.family


def merged(
    model: Model, evidence: Evidence, keep: Mapping[int, Sequence[int]] | None, values: Mapping[str, Any],
    parameters: Mapping[str, Any], folder: str, *, meter: Meter,
) -> tuple[dict[str, Overlay], Any, dict[int, list[int]]]:  # fmt: skip
    """Merge each removed expert into one that stays; the overlay, the groups, and what is kept in each layer."""
    from moeconv.prune.repair.merging import merge

    if keep is None:
        block = planner.plan_prune(model, evidence=evidence, **parameters).block
        keep = {int(layer): kept for layer, kept in block["keep"].items()}
    groups = choice.groups_of(model, evidence, keep, take(PruneOptions, values))
    statistics = evidence.statistics
    assert statistics is not None
    saliency = {at: np.asarray(statistics.layer(at, "gate_norm_sum")).sum(axis=0) for at in model.moe_layers}
    read = read_windows(model, values)
    meter.note("merging the experts")
    path = Path(folder) / "merged"
    merge(stream_of(model, read.windows, take(MeasureOptions, values), meter=meter), read, groups, saliency, path)
    return {"merged": Overlay(path)}, groups, {layer: sorted(kept) for layer, kept in keep.items()}


def distilled(
    model: Model, evidence: Evidence, keep: Any, overlays: Mapping[str, Overlay], values: Mapping[str, Any],
    parameters: Mapping[str, Any], folder: str, *, meter: Meter,
) -> tuple[Overlay, dict[str, Any]]:  # fmt: skip
    """Router-KD (arXiv 2603.02217): the pruned model is written to a temporary directory, its routers are trained to
    the unpruned model's logits, and come back as an overlay."""
    from moeconv.tune.run import tune

    plan = planner.plan_prune(
        model, evidence=evidence, keep_experts=keep, overlays=dict(overlays) or None, **parameters
    )
    student = os.path.join(folder, "pruned")
    execute(plan, source=model.checkpoint, out=student, origins=dict(overlays) or None, meter=meter)
    path = os.path.join(folder, "tuned")
    asked = named(values, MeasureOptions) | named(values, DataOptions)
    block = tune(
        student, path, seed=parameters["seed"], meter=meter, objective="distill", teacher=str(model.checkpoint.path),
        train="router", steps=take(PruneOptions, values).distill, balance=0.0,
        **{k: v for k, v in asked.items() if k not in parameters_of(TuneOptions())},
    )  # fmt: skip
    shutil.rmtree(student)
    figures = ("steps", "kl_before", "kl_after", "loss_before", "loss_after", "improved")
    return Overlay(Path(path)), {name: block[name] for name in figures}
