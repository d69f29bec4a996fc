"""From neuron statistics to a partition file: every FFN is cut into a shared expert and routed experts.

One FFN is in memory at a time. The stock module computes the activations of the token sample again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from moeconv.calibrate.neurons import NeuronStatistics, activations, down_module
from moeconv.checkpoint.artifact import artifact_metadata
from moeconv.checkpoint.writer import writing_artifact
from moeconv.families.model import Model
from moeconv.plan.kernels.stored import to_bytes
from moeconv.plan.meter import Meter
from moeconv.plan.partition import KIND, VERSION
from moeconv.plan.phases import phase
from moeconv.stream.layers import layer_bytes
from moeconv.stream.memory import release_memory
from moeconv.stream.skeleton import Skeleton
from moeconv.tensors import decode_weight
from moeconv.upcycle.ffn_split import Ffn, FfnSplit, split_ffn

_ROWS = 4096  # tokens per forward pass


@torch.no_grad()
@phase("partition")
def write_partition(
    model: Model,
    statistics: NeuronStatistics,
    path: str | os.PathLike[str],
    *,
    experts: int,
    top_k: int,
    shared: int,
    width: int,
    layers: Sequence[int],
    varied: bool,
    best: int | None = None,
    clustering: str = "refined",
    device: torch.device,
    seed: int,
    meter: Meter,
) -> None:
    """Split the FFNs of `layers` into `experts` routed experts of `width` neurons and a shared one of `shared` neurons,
    and write the partition to `path`.

    `varied`: some of the routed experts may be always on, and each layer has the number of them with the smallest
    output error. `best`: keep only that many layers, those with the smallest relative output error.
    """
    skeleton = Skeleton(model, dtype=torch.float32, device=device)
    pieces, held = experts + shared // width, shared // width
    cuts: dict[int, FfnSplit] = {}
    meter.start(total_bytes=sum(layer_bytes(model, layer) for layer in layers), parts=len(layers), unit="layer")
    for layer in layers:
        ffn = _sample(skeleton, statistics, layer, seed=seed, device=device)
        always = _shares(held, top_k) if varied else [held]
        cuts[layer] = split_ffn(ffn, pieces=pieces, active=held + top_k, always=always, clustering=clustering)
        cut = cuts[layer]
        meter.note(f"layer {layer}: relative output error {cut.error:.4f}, {cut.always} of {pieces} parts always on")
        meter.advance(layer_bytes(model, layer))
        meter.part_done()
        del ffn
        release_memory()
    if best is not None:
        cheapest = sorted(cuts, key=lambda at: (cuts[at].error, at))[:best]
        cuts = {layer: cuts[layer] for layer in sorted(cheapest)}
    _write(model, statistics, Path(path), cuts, experts=experts, top_k=top_k, shared=shared, width=width, seed=seed,
           clustering=clustering)  # fmt: skip


def _shares(held: int, top_k: int) -> list[int]:
    """The numbers of pieces that are always on to try: all from `held` to every active piece, or five of them."""
    if top_k <= 5:
        return list(range(held, held + top_k + 1))
    return sorted({held + round(top_k * share / 4) for share in range(5)})


def _sample(skeleton: Skeleton, statistics: NeuronStatistics, layer: int, *, seed: int, device: torch.device) -> Ffn:
    """The FFN inputs of a layer from the statistics, and the activations that the stock FFN computes from them."""
    model = skeleton.model
    down = down_module(skeleton, model, layer)
    assert isinstance(down.weight, Tensor)
    module = skeleton.parent(down)
    name = skeleton.name_of(module)
    wanted = [n for n, role in model.roles.items() if role.layer == layer and role.group == "ffn"]
    skeleton.fill({n: decode_weight(model, n) for n in wanted}, under=name + ".")
    x = statistics.field(layer, "inputs").to(device)
    with activations(down) as seen:
        for rows in x.split(_ROWS):
            module(rows[None])
    ffn = Ffn(x, torch.cat(seen), down.weight.detach().float().clone(), layer, seed)
    skeleton.empty(module)
    return ffn


def _write(
    model: Model, statistics: NeuronStatistics, path: Path, cuts: dict[int, FfnSplit], *, experts: int, top_k: int,
    shared: int, width: int, seed: int, clustering: str,
) -> None:  # fmt: skip
    held = shared // width
    specs: list[tuple[str, str, tuple[int, ...]]] = []
    values: dict[str, Tensor] = {}
    rows = []
    for layer, cut in cuts.items():
        fixed = cut.always - held
        made = {
            "experts": cut.neurons[held:].to(torch.int32),
            "router": torch.cat([torch.zeros(fixed, model.hidden_size), _normalised(cut, statistics, layer)]),
            "always": (torch.arange(experts) < fixed).float(),
        }
        if held:
            made["shared"] = cut.neurons[:held].flatten().to(torch.int32)
        for field, value in made.items():
            dtype = "I32" if value.dtype == torch.int32 else "F32"
            specs.append((f"layer.{layer}.{field}", dtype, tuple(value.shape)))
            values[f"layer.{layer}.{field}"] = value
        rows.append({
            "layer": layer, "always_on": cut.always, "error": round(cut.error, 6),
            "compensated_error": round(cut.compensated, 6), "router": cut.fit,
        })  # fmt: skip
    about = {
        "identity": model.identity,
        "experts": experts,
        "top_k": top_k,
        "shared": shared,
        "width": width,
        "clustering": clustering,
        "seed": seed,
        "layers": rows,
        "tokens": statistics.metadata["tokens"],
        "sample_tokens": statistics.metadata["sample_tokens"],
        "sources": statistics.metadata["sources"],
        "seq_len": statistics.metadata["seq_len"],
    }
    if (measured_on := statistics.metadata["identity"]) != model.identity:
        about["stats_of_twin"] = measured_on
    metadata = artifact_metadata(KIND, version=VERSION, **about)
    with writing_artifact(path, specs, metadata=metadata, overwrite=False) as writer:
        for name, value in values.items():
            writer.write(name, to_bytes(value.contiguous()))


def _normalised(cut: FfnSplit, statistics: NeuronStatistics, layer: int) -> Tensor:
    """The fitted rows without their mean, scaled so that the logits have a standard deviation of 1. Neither changes
    which experts are chosen."""
    rows = cut.router.cpu().float()
    if not len(rows):
        return rows.reshape(0, rows.shape[-1])
    rows = rows - rows.mean(0)
    spread = (statistics.field(layer, "inputs") @ rows.T).std(0, correction=0).square().mean().sqrt()
    return rows / spread.clamp_min(1e-20)
