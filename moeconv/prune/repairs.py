"""Repairs of a pruned model before it is written: experts are refitted, merged or chosen again, routers distilled."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moeconv.checkpoint.overlay import Overlay
from moeconv.errors import InputError
from moeconv.families.model import Model
from moeconv.families.neurons import Narrow
from moeconv.options import parameters_of
from moeconv.plan.execute import execute
from moeconv.plan.meter import Meter
from moeconv.plan.phases import phase
from moeconv.prune import choice, planner
from moeconv.prune.criteria import CRITERIA, Evidence
from moeconv.prune.decision import Decision, with_keep
from moeconv.prune.width import ORIGIN
from moeconv.prune.windows import heal_of, read_windows, refit_of, stream_of
from moeconv.requests import PruneRequest
from moeconv.types import Config, JsonObject
from moeconv.world import first

if TYPE_CHECKING:
    from torch import Tensor

    from moeconv.data.windows import TokenData
    from moeconv.prune.repair.variant import Variant
    from moeconv.stream.layer import Layer
    from moeconv.stream.share import Share

REPAIRS = ("refit", "sequential", "heal", "merge", "distill")


@dataclass(frozen=True)
class Repaired:
    """A decision after a repair, the tensors that the repair made by their origin, and its figures for the JSON."""

    decision: Decision
    overlays: Mapping[str, Overlay]
    figures: Config


@phase("repair")
def repaired(
    model: Model, evidence: Evidence, request: PruneRequest, before: Repaired, folder: Path, *, meter: Meter
) -> Repaired:  # fmt: skip
    """Run the model once more, so that each layer gets the outputs of the pruned layers before it. The experts are
    chosen on these (--sequential), lose neurons (--width), and are refitted to the residual stream of the unpruned
    model (--refit)."""
    from moeconv.calibrate.state import EVERY
    from moeconv.prune.repair.healed import write_healed
    from moeconv.prune.repair.progress import PassProgress
    from moeconv.prune.repair.pruned import pruned_pass
    from moeconv.prune.repair.run import repair
    from moeconv.prune.repair.variant import Variant

    options, decision = request.prune, before.decision
    read = first(lambda: read_windows(model, request))
    meter.note(
        "healing layer by layer" if options.heal
        else "refitting the experts" if options.refit
        else "choosing neurons layer by layer" if decision.width else "choosing experts layer by layer"
    )  # fmt: skip
    refitted = decision.left if options.refit else 0
    healed = decision.left if options.heal else 0
    width, narrow = decision.width, None if decision.width is None else decision.width.narrow(model)
    cut = width is not None and width.after < width.before
    narrowed = (decision.left or 1) if cut else 0  # a dense model has one FFN
    stream = stream_of(
        model, read.windows, request.measure, meter=meter, refitted=refitted, healed=healed,
        narrowed=narrowed, share=True, shared=width is not None,
    )  # fmt: skip
    variant = Variant(
        keep={} if options.sequential else {layer: list(kept) for layer, kept in decision.keep.items()},
        choose=_chooser(model, evidence, request, decision.left, read, stream.share) if options.sequential else None,
        refit=refit_of(options) if options.refit else None,
        width=width.after if width is not None and cut else None,
        shared=None if width is None else width.shared,
        top_k=options.top_k,
        heal=heal_of(options, seed=request.plan.seed) if options.heal else None,
    )
    overlays, figures = dict(before.overlays), dict(before.figures)
    if options.heal:
        path, settings = folder / "heal", {"method": "heal", "steps": options.heal, "refit": options.refit}
        write_healed(
            stream, read, variant, path, left=decision.left, settings=settings, narrow=narrow, meter=meter,
            save_every=EVERY,
        )  # fmt: skip
        overlays["heal"] = Overlay(path)
        figures["heal"] = {"steps": options.heal, "layers": [asdict(row) for row in variant.healed]}
        if options.refit:
            figures["refit"] = {"layers": [asdict(f) for f in variant.fitted]}
    elif options.refit or narrow is not None:
        word = "refit" if options.refit else "width"
        path, settings = folder / word, {"method": word}
        if options.refit:
            settings |= {"strength": options.refit_strength, "sweeps": options.refit_sweeps}
        repair(
            stream, read, variant, path, left=decision.left, settings=settings, narrow=narrow, meter=meter,
            save_every=EVERY,
        )  # fmt: skip
        overlays[word] = Overlay(path)
        if options.refit:
            figures["refit"] = {"layers": [asdict(f) for f in variant.fitted]}
    else:
        pruned_pass(
            stream, [variant], progress=PassProgress(folder / "sequential", stream, read, meter=meter, every=EVERY)
        )
    if model.num_experts:
        decision = with_keep(decision, {layer: sorted(kept) for layer, kept in variant.keep.items()})
    if narrow is not None:
        overlays |= neurons_of(
            narrow, decision, folder, chosen=_arrays(variant.neurons), shared=_arrays(variant.shared_neurons)
        )
        figures |= _figures(variant)
    return Repaired(decision, overlays, figures)


def _arrays(neurons: Mapping[int, Tensor]) -> dict[int, np.ndarray]:
    return {layer: of_layer.cpu().numpy() for layer, of_layer in neurons.items()}


def _figures(variant: Variant) -> JsonObject:
    """What was measured while the experts, and the shared expert, lost neurons."""
    rows: dict[str, list[Any]] = {
        "width": variant.narrowed, "shared_width": variant.shared_narrowed, "shared_refit": variant.shared_fitted,
    }  # fmt: skip
    return {name: {"layers": [asdict(row) for row in found]} for name, found in rows.items() if found}


def remove_stale(folder: Path) -> None:
    """Remove what an interrupted run left in `folder`, except the state from which a pass resumes."""
    for entry in os.scandir(folder):
        if not entry.name.endswith((".begun", ".moeconv-state")):
            shutil.rmtree(entry.path) if entry.is_dir() else os.unlink(entry.path)


def neurons_of(
    narrow: Narrow, decision: Decision, folder: Path, *, chosen: Mapping[int, np.ndarray] | None = None,
    shared: Mapping[int, np.ndarray] | None = None,
) -> dict[str, Overlay]:  # fmt: skip
    """{origin: the file with the neurons that stay}, in the layers `chosen` {layer: [n, W]} and, for the shared expert,
    `shared` {layer: [1, W]} those that data decided."""
    from moeconv.prune.repair.neurons import write_neurons

    path = folder / ORIGIN
    keep = {layer: sorted(kept) for layer, kept in decision.all_kept.items()}
    write_neurons(narrow, keep, path, chosen=chosen or {}, shared=shared)
    return {ORIGIN: Overlay(path)}


def remarks_on(extra: Config) -> list[str]:
    """The warnings of a refit and of healing: too little text, and layers that keep their old weights."""
    from moeconv.data import heldout

    layers = extra.get("refit", {}).get("layers", [])
    found = heldout.remarks_on(layers, what="--refit", kept="the weights that they had", fitted="the refitted ones")
    back = [row["layer"] for row in extra.get("heal", {}).get("layers", []) if not row["kept"]]
    if back:
        found.append(
            f"--heal: {heldout.layers_in_words(back)} keep the weights that they had, because the trained ones are not "
            "clearly better on held-out tokens"
        )
    return found


class _Fields:
    """The statistics of one layer, in memory."""

    def __init__(self, fields: Mapping[str, np.ndarray]) -> None:
        self._fields = fields

    def layer(self, layer: int, field: str) -> np.ndarray:
        if field not in self._fields:
            raise InputError(
                f"layer {layer} has no {field}: the rule that its router follows is not known",
                hint="Pass --criterion saliency.",
            )
        return self._fields[field]


def _chooser(
    model: Model, evidence: Evidence, request: PruneRequest, left: int, read: TokenData, share: Share
) -> Callable[[Layer, Tensor], list[int]]:
    """A function that measures the statistics of a layer on the outputs of the pruned layers before it, and returns the
    experts that the criterion keeps."""
    import torch

    from moeconv.calibrate.need import sample_size
    from moeconv.calibrate.statistics import layer_statistics

    options = request.prune
    sample = request.calibrate.sample_tokens or sample_size(
        read.tokens, top_k=model.top_k, num_experts=model.num_experts
    )

    def choose(layer: Layer, hidden: Tensor) -> list[int]:
        fields = layer_statistics(
            layer, source=torch.from_numpy(read.source), num_sources=len(read.sources), num_experts=model.num_experts,
            seed=request.plan.seed, sample_tokens=sample, rule=evidence.rule,
            hidden=hidden, mine=share.mine,
        )  # fmt: skip
        here = replace(evidence, statistics=_Fields(fields), samples={})
        chosen = CRITERIA[str(options.criterion)]
        protected = choice.protected_experts(_OneLayer(model, layer.index), options, here)  # type: ignore[arg-type]
        order = chosen.order(here, layer.index, protected[layer.index])
        kept = choice.choose(
            model, {layer.index: order}, left, evidence=here, criterion=chosen.name, protected=protected
        )[layer.index]
        return first(lambda: list(kept))

    return choose


class _OneLayer:
    """A view of a model as if it had a single MoE layer, for functions that work on all layers of a model."""

    def __init__(self, model: Model, layer: int) -> None:
        self.moe_layers, self.num_experts, self.family = (layer,), model.num_experts, model.family


@phase("merge")
def merged(
    model: Model, evidence: Evidence, request: PruneRequest, before: Repaired, folder: Path, *, meter: Meter
) -> Repaired:  # fmt: skip
    """Average each removed expert into the most similar kept one (--merge)."""
    from moeconv.prune.repair.merging import merge

    decision = before.decision
    groups = choice.groups_of(model, evidence, decision.keep, request.prune)
    statistics = evidence.statistics
    assert statistics is not None
    saliency = {at: np.asarray(statistics.layer(at, "gate_norm_sum")).sum(axis=0) for at in model.moe_layers}
    read = read_windows(model, request)
    meter.note("merging the experts")
    path = folder / "merged"
    merge(stream_of(model, read.windows, request.measure, meter=meter), read, groups, saliency, path)
    keep = {layer: sorted(kept) for layer, kept in decision.keep.items()}
    return Repaired(with_keep(decision, keep, groups=groups), {"merged": Overlay(path)}, before.figures)


@phase("distill")
def distilled(
    model: Model, evidence: Evidence, request: PruneRequest, before: Repaired, folder: Path, *, meter: Meter
) -> Repaired:  # fmt: skip
    """Distil the routers (Router-KD, arXiv 2603.02217): the pruned model is written to a temporary directory, and its
    routers are trained on the logits of the unpruned model. They are returned as an overlay."""
    from moeconv.tune.run import tune

    plan = planner.prune_plan(
        model, request.prune, request.plan, before.decision, evidence=evidence, overlays=before.overlays or None
    )
    student, path = folder / "pruned", folder / "tuned"
    execute(plan, source=model.checkpoint, out=student, origins=before.overlays or None, meter=meter)
    block = tune(
        student, path, seed=request.plan.seed, meter=meter, objective="distill", teacher=str(model.checkpoint.path),
        train="router", steps=request.prune.distill, balance=0.0,
        **parameters_of(request.measure, request.data),
    )  # fmt: skip
    shutil.rmtree(student)
    figures = {
        name: block[name] for name in ("steps", "kl_before", "kl_after", "loss_before", "loss_after", "improved")
    }
    overlays = dict(before.overlays) | {"tuned": Overlay(path)}
    return Repaired(before.decision, overlays, dict(before.figures) | {"distill": figures})
