"""Proof after writing: packed weights are decoded again and compared with the source, and counted against the plan.

Imports torch, and only when called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

from moeconv.checkpoint.header import BLOCK_DTYPES
from moeconv.checkpoint.overlay import Overlay
from moeconv.contract import ErrorLayer, PackingError
from moeconv.errors import CheckError, escape
from moeconv.families.model import Model, open_model
from moeconv.families.packed import CODES, split_part
from moeconv.plan.plan import Item, Plan, Shard, TensorSpec
from moeconv.quantize.awq_factors import factors_of
from moeconv.quantize.formats import FORMATS

Weight = Any  # a torch Tensor; this module must not import torch when it is imported
Decoder = Callable[[TensorSpec], Weight]  # from a tensor of codes to the weight that it decodes to


class PackingProof(TypedDict):
    """The error of the sampled weights, and the number of packed weights by role, as found on disk."""

    error: PackingError
    counted: dict[str, int]


def prove_packing(
    plan: Plan, source: Model, staged: Path, *, before: Plan | None = None, folds: Overlay | None = None
) -> PackingProof:
    """Decode the first and the last matrix of every role in every layer, and compare each with its source in float32.
    Where codes come from an overlay, `before` is the plan that packs the source itself, and `folds` the overlay, for
    the factors that AWQ moves into the weights.

    Raises CheckError when a decoded weight has a larger error than codes of its width can have, and when the number of
    packed weights of a role is not the planned one.
    """
    from moeconv.plan.kernels.pack.common import relative_rms

    counted = _count(plan, staged)
    planned = _planned(plan)
    if counted != planned:
        raise CheckError(f"the packed weights on disk are {counted}, and the plan has {planned}")
    format = FORMATS[plan.block["format"]]
    decode = _gguf_decoder(plan.shards, staged) if plan.gguf else _decoder(staged)
    packed = None if folds is None else factors_of(folds, open_model(staged))
    layers: dict[int | None, list[float]] = {}
    for layer, item, spec in _sample(before or plan, source):
        weight = _source_weight(source, item)
        error = relative_rms(weight if packed is None else packed(spec.name, weight), decode(spec))
        if not error <= format.limit(8 * spec.nbytes / spec.params, spec.dtype):
            raise CheckError(
                f"{escape(spec.name)} decodes with a relative error of {error:.3f}, which is too large for its bits",
                hint="The weights may have extreme outliers. Try a smaller --group-size, or 8 bits.",
            )
        layers.setdefault(layer, []).append(error)
    if not layers:
        raise CheckError(
            "the plan packs no weight", hint="No scheme of the format has the dtype of its codes in `codes`."
        )
    every = [error for errors in layers.values() for error in errors]
    rows: list[ErrorLayer] = [
        {"layer": layer, "relative_rms": sum(e) / len(e), "max": max(e)} for layer, e in layers.items()
    ]
    found: PackingError = {
        "relative_rms": {"mean": sum(every) / len(every), "max": max(every)},
        "layers": rows,
        "sampled": len(every),
    }
    return {"error": found, "counted": counted}


def _packed(plan: Plan) -> Iterator[tuple[Item, TensorSpec]]:
    """Every packed weight: the item that makes its codes, and the codes' tensor."""
    coded = {scheme.codes for scheme in FORMATS[plan.block["format"]].schemes}
    changed = (item for item in plan.items() if item.changed)
    return ((item, spec) for item in changed for spec in item.outputs if spec.params and spec.dtype in coded)


def _planned(plan: Plan) -> dict[str, int]:
    counts: dict[str, int] = {}
    for item, _ in _packed(plan):
        counts[item.changed] = counts.get(item.changed, 0) + 1
    return counts


def _count(plan: Plan, staged: Path) -> dict[str, int]:
    """The number of packed weights by role, from the headers on disk."""
    counts: dict[str, int] = {}
    if plan.gguf:
        from moeconv.checkpoint.gguf import written_tensors

        groups = {spec.name.partition("#")[0]: (item.changed, "#" in spec.name) for item, spec in _packed(plan)}
        found = (entry for shard in plan.shards for entry in written_tensors(staged / shard.name))
        for name, dtype, shape in found:
            if dtype in BLOCK_DTYPES or name in groups:
                group, stacked = groups.get(name, (name, False))
                counts[group] = counts.get(group, 0) + (shape[0] if stacked else 1)
        return counts
    model = open_model(staged)
    for name, role in model.roles.items():
        ref = model.checkpoint.tensors[name]
        if role.part in CODES:
            stacked = role.group == "expert" and role.expert is None
            counts[role.group] = counts.get(role.group, 0) + (ref.shape[0] if stacked else 1)
    return counts


def _sample(plan: Plan, source: Model) -> Iterator[tuple[int | None, Item, TensorSpec]]:
    """(layer, item, codes) of the first and the last matrix of every role in every layer."""
    ends: dict[tuple[int | None, str], list[tuple[Item, TensorSpec]]] = {}
    for item, spec in _packed(plan):
        ends.setdefault((source.roles[item.inputs[0].tensor].layer, spec.role), [])[1:] = [(item, spec)]
    for (layer, _), pairs in sorted(ends.items(), key=lambda entry: (entry[0][0] or 0, entry[0][1])):
        yield from ((layer, item, spec) for item, spec in pairs)


def _plain(name: str) -> str:
    """The weight that a tensor of codes is a part of."""
    split = split_part(name)
    return split[0] if split else name


def _source_weight(source: Model, item: Item) -> Weight:
    """The matrix that the item packs, in float32."""
    from moeconv.tensors import packed_source

    return packed_source(source.checkpoint, item).float()


def _decoder(staged: Path) -> Decoder:
    """The function from a tensor of codes to the weight that it and its companions decode to."""
    import torch

    from moeconv.families.packed import SHARED
    from moeconv.plan.kernels.decode import decode_parts
    from moeconv.plan.kernels.stored import to_tensor
    from moeconv.tensors import decode_weight

    model = open_model(staged)

    def decode(spec: TensorSpec) -> Weight:
        if not spec.of:
            return decode_weight(model, _plain(spec.name), torch.float32)
        parts, stored = {}, model.stored[_plain(spec.name)]
        for part, name in stored.parts.items():
            ref = model.checkpoint.tensors[name]
            size, shape = (
                ref.nbytes // spec.of,
                (1, *ref.shape[1:]),
            )  # one expert's share; parts that all experts share are read whole
            start = spec.at * size
            if part in SHARED:  # one for all experts
                start, size, shape = 0, ref.nbytes, ref.shape
            data = model.checkpoint.read(name, start=start, length=size)
            parts[part] = to_tensor(bytearray(data), ref.dtype, shape)
        return decode_parts(parts, name=spec.name, how=stored.how, dtype=torch.float32)[0]

    return decode


def _gguf_decoder(shards: Sequence[Shard], staged: Path) -> Decoder:
    """The same for GGUF files, by the `gguf` package."""
    import torch

    from moeconv.checkpoint.gguf import open_gguf
    from moeconv.plan.kernels.pack.ggml import decode as decode_blocks
    from moeconv.plan.kernels.stored import to_tensor

    files = [open_gguf(staged / shard.name) for shard in shards]
    tensors = {tensor.name: tensor for file in files for tensor in file.tensors}

    def decode(spec: TensorSpec) -> Weight:
        name, _, expert = spec.name.partition("#")
        start = int(expert or 0) * spec.nbytes
        data = tensors[name].data.reshape(-1).view("u1")[start : start + spec.nbytes]
        if spec.dtype not in BLOCK_DTYPES:
            return to_tensor(bytearray(data), spec.dtype, spec.shape).float()
        return torch.from_numpy(decode_blocks(data.data, spec.dtype, spec.shape))

    return decode
