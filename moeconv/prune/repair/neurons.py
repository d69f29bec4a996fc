"""Writes the file with the neurons that stay, which a plan reads as the origin `neurons`.

Where no data decided, it is the neurons with the largest product of norms: of the rows of gate and up, and of the
column of down. Scaling one of them up and another down by the same factor changes neither the function nor the product.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from moeconv.checkpoint.artifact import artifact_metadata
from moeconv.checkpoint.overlay import writing_overlay
from moeconv.families.neurons import Narrow
from moeconv.families.spec import Role
from moeconv.plan.kernels.arrays import raw_bytes, to_float32
from moeconv.prune.cutting import Keep, with_mtp
from moeconv.prune.width import neurons_name

VERSION = 1


def write_neurons(
    narrow: Narrow, keep: Keep, path: Path, *, chosen: Mapping[int, np.ndarray],
    shared: Mapping[int, np.ndarray] | None = None,
) -> None:  # fmt: skip
    """Write the overlay `path`. `chosen` {layer: [n, W]} are the neurons of the kept experts, or of the FFN of a dense
    model, that data decided, `shared` {layer: [1, W]} those of the shared expert; for other layers, and for FFNs that
    share the experts' width, the weights decide."""
    model = narrow.model
    decided = {"expert" if model.family.kind == "moe" else "ffn": chosen, "shared": shared or {}}
    found: dict[tuple[int, str], list[tuple[str, Role]]] = {}
    for name, role in model.roles.items():
        cut = narrow.cut(role)
        if role.layer is not None and cut is not None and cut.new <= cut.size:
            found.setdefault((role.layer, role.group), []).append((name, role))
    whole, width = with_mtp(model, keep), {at: narrow.cut(roles[0][1]) for at, roles in found.items()}
    about = artifact_metadata("overlay", version=VERSION, identity=model.identity, method="neurons", width=narrow.width)
    tensors = []
    for (layer, group), cut in width.items():
        assert cut is not None
        rows = len(whole[layer]) if group == "expert" else 1
        tensors.append((layer, (neurons_name(layer, group), "I32", (rows, cut.new))))
    with writing_overlay(path, tensors, metadata=about, overwrite=True) as writer:
        for (layer, group), of_group in found.items():
            cut = width[layer, group]
            assert cut is not None
            if layer in decided.get(group, {}):
                made = decided[group][layer]
            else:
                made = _largest(narrow, of_group, whole[layer] if group == "expert" else (None,), cut.new)
            writer.write(neurons_name(layer, group), raw_bytes(made.astype(np.int32)))


def _largest(
    narrow: Narrow, of_group: Sequence[tuple[str, Role]], experts: Sequence[int | None], new: int
) -> np.ndarray:
    """[n, new]: the neurons of each expert with the largest products of norms, in ascending order."""
    rows = []
    for expert in experts:
        score: np.ndarray | float = 1.0
        for name, role in of_group:
            if role.key.endswith("_bias") or (role.expert is not None and role.expert != expert):
                continue
            score = score * _norms(narrow, name, role, expert)
        order = np.argsort(-np.asarray(score), kind="stable")
        rows.append(np.sort(order[:new]))
    return np.stack(rows)


def _norms(narrow: Narrow, name: str, role: Role, expert: int | None) -> np.ndarray:
    """float64 [I]: the product over the matrices in a tensor of the norms of each neuron's weights. Where the tensor
    holds all experts, those of `expert`."""
    model, cut = narrow.model, narrow.cut(role)
    assert cut is not None
    ref = model.checkpoint.tensors[name]
    start, length = 0, ref.nbytes
    if role.expert is None and expert is not None:
        length //= math.prod(ref.shape) // math.prod(cut.dims)
        start = expert * length
    data = model.checkpoint.read(name, start=start, length=length)
    values = to_float32(data, ref.dtype, cut.dims).astype(np.float64)
    axes = tuple(i for i in range(len(cut.dims)) if i not in (cut.axis, cut.part))
    norms = np.sqrt(np.square(values).sum(axis=axes))
    if cut.part is None:
        return norms
    return np.prod(norms, axis=0 if cut.part < cut.axis else 1)
