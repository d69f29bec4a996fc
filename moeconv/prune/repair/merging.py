"""Merging: every kept expert absorbs the dropped experts that are most similar to it, after their neurons were matched.

As in REAM and HC-SMoE, the experts of a group are averaged with their saliency as weight. The neurons of an FFN have no
order, so the neurons of each absorbed expert are first permuted to those of the kept one, by the assignment that makes
activations and weights most similar.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moeconv.checkpoint.artifact import artifact_metadata
from moeconv.checkpoint.overlay import writing_overlay
from moeconv.data.windows import TokenData
from moeconv.families.model import Model
from moeconv.families.spec import FFN_PARTS
from moeconv.matching import assignment
from moeconv.plan.kernels.stored import to_bytes
from moeconv.prune.repair.run import OVERLAY_VERSION, on_disk, overlay_names
from moeconv.stream.experts import activations
from moeconv.stream.layer import Layer
from moeconv.stream.layers import LayerStream
from moeconv.tensors import decode_weight

_TOKENS = 2048  # number of tokens on which activations are compared

Groups = Mapping[int, Mapping[int, Sequence[int]]]


@torch.no_grad()
def merge(stream: LayerStream, read: TokenData, groups: Groups, saliency: Mapping[int, np.ndarray], path: Path) -> None:
    """Write the overlay `path` with the merged experts, named as in the pruned model. `groups` {layer: {kept:
    absorbed}} are the experts to average, with the weights `saliency` {layer: [E]}. Raises InputError for packed
    experts."""
    left = len(next(iter(groups.values())))
    names = overlay_names(stream.model, left, FFN_PARTS)
    about = artifact_metadata(
        "overlay", version=OVERLAY_VERSION, identity=stream.model.identity, experts=left, method="merge",
        sources=[source.to_json() for source in read.sources],
    )  # fmt: skip
    tensors = [(layer, layout) for (layer, _, _), layout in names.items()]
    with writing_overlay(path, tensors, metadata=about, overwrite=True) as writer:
        for layer in stream.layers():
            hidden = _inputs(layer)
            if layer.experts is None:
                continue
            made = merged_layer(stream.model, layer, hidden, groups[layer.index], saliency[layer.index])
            for name, tensor in on_disk(stream.model, layer.index, list(made), made, parts=FFN_PARTS):
                writer.write(name, to_bytes(tensor))


def _inputs(layer: Layer) -> Tensor:
    """Compute a layer, and return an evenly spaced sample of the inputs of its experts, [n, D]."""
    parts = [batch.expert_input for batch in layer.batches()]
    step = max(1, sum(map(len, parts)) // _TOKENS)
    return torch.cat([part[::step] for part in parts])[:_TOKENS]


def merged_layer(
    model: Model, layer: Layer, hidden: Tensor, groups: Mapping[int, Sequence[int]], saliency: np.ndarray
) -> dict[int, dict[str, Tensor]]:
    """{kept expert: {gate, up, down}}, the averaged matrices in float32."""
    made: dict[int, dict[str, Tensor]] = {}
    for kept, absorbed in groups.items():
        mine = _matrices(model, layer.index, kept)
        total = max(float(saliency[kept]), 1e-30)
        sums = {part: matrix.double() * total for part, matrix in mine.items()}
        for other in absorbed:
            weight = float(saliency[other])
            theirs = _matrices(model, layer.index, other)
            order = torch.from_numpy(_matched(layer, hidden, kept, other, mine, theirs))
            for part, matrix in theirs.items():
                moved = matrix[:, order] if part == "down" else matrix[order]
                sums[part] += moved.double() * weight
            total += weight
        made[kept] = {part: (value / total).float() for part, value in sums.items()}
    return made


def _matched(
    layer: Layer, hidden: Tensor, kept: int, other: int, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
) -> np.ndarray:
    """order[i]: the neuron of `other` that corresponds to neuron i of `kept`. The assignment (Hungarian algorithm)
    maximises the sum of the cosine of their activations and the cosine of their weights."""
    assert layer.experts is not None
    one, two = (_units(activations(layer.experts, hidden, e).T) for e in (kept, other))
    weights = _units(_neurons(mine)) @ _units(_neurons(theirs)).T
    return assignment((one @ two.T + weights).double().cpu().numpy())[1]


def _neurons(matrices: Mapping[str, Tensor]) -> Tensor:
    """[I, 3H]: for each neuron its gate row, up row and down column."""
    return torch.cat([matrices["gate"], matrices["up"], matrices["down"].T], dim=1)


def _units(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows.float(), dim=-1, eps=1e-30)


def _matrices(model: Model, layer: int, expert: int) -> dict[str, Tensor]:
    return {
        part: decode_weight(model, model.expert_name(part, layer=layer, expert=expert)).float() for part in FFN_PARTS
    }
