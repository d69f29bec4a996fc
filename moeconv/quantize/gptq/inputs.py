"""The scales of inputs that a scheme stores beside its weights, measured on data: an overlay of one number per weight.

The scale of a matrix maps the largest magnitude among its inputs to the largest scale and code of NVFP4. An expert that
no token was routed to has the largest magnitude of its layer.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from moeconv.checkpoint.artifact import artifact_metadata
from moeconv.checkpoint.overlay import writing_overlay
from moeconv.data.windows import load_tokens, sequence_length
from moeconv.errors import InputError, escape
from moeconv.families.model import Model
from moeconv.options import SEQ_LEN, TOKENS, DataOptions, MeasureOptions, device_limit, parse_size
from moeconv.plan.kernels.pack.fp4 import global_scale
from moeconv.plan.kernels.stored import to_bytes
from moeconv.plan.meter import Meter
from moeconv.plan.plan import Item
from moeconv.quantize.gptq.groups import role_of, weight_name
from moeconv.quantize.inputs import scale_items
from moeconv.stream.device import pick_device
from moeconv.stream.inputs import InputMatrix, layer_inputs
from moeconv.stream.layers import start_meter, stream_within
from moeconv.tensors import all_finite
from moeconv.units import counted

VERSION = 1
_NAMED = 8  # experts that a warning names


class _Peaks:
    """The largest magnitude per expert, [experts]: numbers of `dtype`, that of the inputs."""

    def __init__(self, experts: int, columns: int, _layer: int) -> None:
        self.found, self.columns, self.dtype = torch.zeros(experts), columns, torch.float32

    def add(self, rows: Tensor) -> None:
        """Rows [..., columns] of an ordinary matrix."""
        if rows.shape[-1] == self.columns and rows.numel():
            self.found[0], self.dtype = torch.maximum(self.found[0], rows.abs().max().float().cpu()), rows.dtype

    def add_each(self, rows: Tensor, expert: Tensor) -> None:
        """Rows [n, columns], each of its expert [n]."""
        self.found.scatter_reduce_(0, expert.cpu(), rows.abs().amax(-1).float().cpu(), "amax")
        self.dtype = rows.dtype


def measure_inputs(
    model: Model, items: Iterable[Item], path: str | os.PathLike[str], *, data: DataOptions, measure: MeasureOptions,
    view: Model, seed: int, meter: Meter,
) -> list[str]:  # fmt: skip
    """Write an overlay to `path` with the scales that `items`, a plan for weights of `view`, read. Returns warnings
    about experts that no token was routed to.

    Raises InputError for unusable data, for a weight in a layer that the model does not run, and for one whose inputs
    the class does not show."""
    wanted = scale_items(items)
    tensors = [(role_of(view, item).layer, item) for item in wanted]
    if outside := [item for layer, item in tensors if layer is None or layer >= model.num_layers]:
        raise InputError(
            f"{escape(weight_name(outside[0]))!r} is in no layer that runs, so that its inputs cannot be measured",
            hint="Use a scheme that leaves the inputs as they are, such as nvfp4, or another --scope.",
        )
    budget = None if measure.max_memory is None else parse_size(measure.max_memory, flag="--max-memory")
    meter.note("reading the data")
    read = load_tokens(
        data.data, model.checkpoint.path, tokens=measure.tokens or TOKENS,
        seq_len=sequence_length(model, measure.seq_len, default=SEQ_LEN), seed=seed, text_field=measure.text_field,
    )  # fmt: skip
    start_meter(meter, model, tokens=read.windows.size)
    stream = stream_within(
        model, read.windows, device=pick_device(measure.device, device_limit(measure.max_device_memory)),
        batch_size=measure.batch_size, budget=budget,
        meter=meter, what="quantize",
    )  # fmt: skip
    metadata = artifact_metadata(
        "overlay", version=VERSION, identity=view.identity, method="inputs", seed=seed, seq_len=read.seq_len,
        sources=[{"name": s.name, "sha256": s.sha256, "tokens": s.tokens} for s in read.sources],
    )  # fmt: skip
    by_layer: dict[int | None, dict[str, Item]] = {}
    for at, item in tensors:
        by_layer.setdefault(at, {})[weight_name(item)] = item
    layouts = [(at, (s.name, s.dtype, s.shape)) for at, item in tensors for s in item.outputs]
    unused: dict[int, list[int]] = {}
    with writing_overlay(Path(path), layouts, metadata=metadata) as writer:
        for layer in stream.layers():
            here = by_layer.get(layer.index, {})
            peaks: dict[str, Tensor] = {}
            for one, kept in layer_inputs(stream, layer, _matrices(view, here), _Peaks):
                peaks[one.name] = _filled(one, kept.found, unused.setdefault(layer.index, [])).to(kept.dtype)
            for name, item in here.items():
                role = view.roles[name]
                peak = peaks[name if role.expert is None else role.key][int(role.expert or 0)]
                writer.write(item.outputs[0].name, to_bytes(global_scale([peak.reshape(1)])))
    return _warnings(unused)


def _matrices(view: Model, items: Mapping[str, Item]) -> list[InputMatrix]:
    """One matrix per ordinary weight, by its name, and one per matrix that all experts have, by its key."""
    found: dict[str, InputMatrix] = {}
    for name in items:
        role, columns = view.roles[name], view.checkpoint.tensors[name].shape[1]
        if role.expert is None:
            found[name] = InputMatrix(name, columns, 1, role.key, name)
        else:
            found.setdefault(role.key, InputMatrix(role.key, columns, view.num_experts, role.key, name))
    return [*found.values()]


def _filled(one: InputMatrix, peaks: Tensor, unused: list[int]) -> Tensor:
    """The largest magnitudes per expert, where experts without tokens have that of the layer."""
    if not all_finite(peaks):
        raise InputError(
            f"the inputs of {escape(one.source)!r} contain NaN or infinite values",
            hint="The checkpoint is damaged, or its activations overflow.",
        )
    if one.experts == 1 and not bool(peaks.any()):
        raise InputError(
            f"the inputs of {escape(one.source)!r} are not seen in its class of transformers",
            hint="Use a scheme that leaves the inputs as they are, such as nvfp4, or another --scope.",
        )
    unused[:] = sorted({*unused, *(peaks == 0).nonzero().flatten().tolist()}) if one.experts > 1 else unused
    return torch.where(peaks == 0, peaks.max(), peaks)


def _warnings(unused: Mapping[int, list[int]]) -> list[str]:
    return [
        f"layer {layer}: no token was routed to {counted(len(experts), 'expert')} "
        f"({', '.join(map(str, experts[:_NAMED]))}{', ...' if len(experts) > _NAMED else ''}), "
        "whose inputs have the scale of the largest ones of the layer; give more or other text"
        for layer, experts in unused.items()
        if experts
    ]
