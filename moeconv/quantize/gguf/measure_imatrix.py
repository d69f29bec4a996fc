"""`calibrate --imatrix`: llama.cpp's importance matrix from the layer stream, with one layer in memory.

For every matrix of a layer, and every expert: the sums of the squares of its inputs, column by column, and the number
of tokens (ggml-org/llama.cpp, tools/imatrix). An expert without tokens has the mean of its layer, as of one token.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeconv.checkpoint.gguf import GgufHead, Stack, metadata_bytes
from moeconv.checkpoint.imatrix import COUNTS, SUMS
from moeconv.checkpoint.target import check_file_target
from moeconv.checkpoint.writer import writing_artifact
from moeconv.data.windows import load_tokens, sequence_length
from moeconv.errors import InputError, UsageError
from moeconv.families.model import Model, open_model
from moeconv.options import SEQ_LEN, TOKENS, DataOptions, MeasureOptions, device_limit, parse_size, reads_of
from moeconv.plan.meter import Meter
from moeconv.quantize.gguf.llama_cpp import LlamaCpp, find_row, written
from moeconv.quantize.gguf.recipes import is_quantized
from moeconv.stream.device import pick_device
from moeconv.stream.inputs import InputMatrix, layer_inputs
from moeconv.stream.layer import Layer
from moeconv.stream.layers import LayerStream, start_meter, stream_within
from moeconv.types import JsonObject
from moeconv.units import counted
from moeconv.world import current

_NAMED = 8  # experts that a warning names


@dataclass(frozen=True)
class WeighedMatrix(InputMatrix):
    """A matrix of the file whose inputs are measured. `name` is its name there; it is `seen` if its columns are those
    of the tensor that it is made from, whose inputs the class shows."""

    seen: bool = True


def write_imatrix(
    model_path: str, path: Path, *, data: DataOptions, measure: MeasureOptions, seed: int, overwrite: bool, meter: Meter
) -> JsonObject:
    """Run data through a model and write its importance matrix to the file `path`. Returns {output, tokens, sources,
    layers, seconds, warnings}.

    Raises InputError for a model that is not written to GGUF and for unusable data, OutputError for a path that cannot
    be written."""
    began = time.monotonic()
    if current().size > 1:
        raise UsageError("--imatrix is measured by one process", hint="Start `moeconv calibrate` without torchrun.")
    model = open_model(model_path)
    row = find_row(model)
    reads = [("the model", model_path), *reads_of({"data": data.data}, DataOptions)]
    check_file_target(path, what="importance matrix", reads=reads, overwrite=overwrite, replaces=_is_imatrix)
    meter.note("reading the data")
    read = load_tokens(
        data.data, model.checkpoint.path, tokens=measure.tokens or TOKENS,
        seq_len=sequence_length(model, measure.seq_len, default=SEQ_LEN), seed=seed, text_field=measure.text_field,
    )  # fmt: skip
    start_meter(meter, model, tokens=read.windows.size)
    budget = None if measure.max_memory is None else parse_size(measure.max_memory, flag="--max-memory")
    stream = stream_within(
        model, read.windows, device=pick_device(measure.device, device_limit(measure.max_device_memory)),
        batch_size=measure.batch_size, budget=budget,
        meter=meter, what="calibrate",
    )  # fmt: skip
    every = list(matrices_of(model, row))
    matrices, unseen = [one for one in every if one.seen], [one for one in every if not one.seen]
    head = _head(matrices, datasets=[s.name for s in read.sources], chunks=len(read.windows), size=read.seq_len)
    unused: dict[int, list[int]] = {}
    with writing_artifact(path, (), metadata={}, overwrite=overwrite, head=head) as writer:
        for layer in stream.layers():
            here = [m for m in matrices if model.roles[m.source].layer == layer.index]
            for one, (sums, counts) in layer_sums(stream, layer, here):
                if one.experts > 1 and not counts.all():
                    unused[layer.index] = np.flatnonzero(counts == 0).tolist()
                sums, counts = filled(sums, counts)
                writer.write(one.name + SUMS, sums.astype("<f4").tobytes())
                writer.write(one.name + COUNTS, counts.astype("<f4").tobytes())
    sources = [{"name": s.name, "tokens": s.tokens} for s in read.sources]
    return {
        "output": str(path), "tokens": read.tokens, "sources": sources, "layers": [],
        "seconds": time.monotonic() - began, "warnings": _warnings(unused) + _without(unseen),
    }  # fmt: skip


def filled(sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sums [experts, columns] and counts [experts], where experts without tokens have the mean over all tokens of
    the layer, as of one token."""
    total = counts.sum()
    if counts.all() or not total:
        return sums, counts
    unused = counts == 0
    sums = np.where(unused[:, None], sums.sum(0) / total, sums)
    return sums, np.where(unused, 1.0, counts)


def matrices_of(model: Model, row: LlamaCpp) -> Iterator[WeighedMatrix]:
    """The matrices of the layers, in the order of the file."""
    seen: set[str] = set()
    for name, role in model.roles.items():
        if role.layer is None or role.layer >= model.num_layers or (role.part and not name.endswith(".weight")):
            continue
        for tensor in written(model, row, model.checkpoint.tensors[name], role):
            shape = tensor.part.shape
            if tensor.target in seen or len(shape) < 2 or not is_quantized(tensor.target, shape):
                continue
            seen.add(tensor.target)
            experts = 1 if tensor.expert is None else model.num_experts
            kept = experts > 1 or _keeps_columns(tensor.part.tree)
            yield WeighedMatrix(tensor.target, shape[-1], experts, tensor.key, name, kept)


def _keeps_columns(tree: Sequence[Any] | None) -> bool:
    """Whether an expression leaves the last axis of its source the last one."""
    if tree is None:
        return True
    op, params, of = tree
    if op == "transpose" or (op == "permute" and params["axes"][-1] != len(params["axes"]) - 1):
        return False
    return all(_keeps_columns(child) for child in of)


def layer_sums(
    stream: LayerStream, layer: Layer, matrices: Sequence[WeighedMatrix]
) -> Iterator[tuple[WeighedMatrix, tuple[np.ndarray, np.ndarray]]]:
    """Run a layer; yield each matrix with the sums of squares of its inputs float64 [experts, columns] and the numbers
    of tokens [experts]: ones for a matrix whose inputs are not seen."""
    for one, found in layer_inputs(stream, layer, matrices, _Sum):
        # the class may read the weight of a module without running it: then all columns count alike
        yield one, found.result() if found.counts.any() else (np.ones((one.experts, one.columns)), np.ones(one.experts))


class _Sum:
    """Sums of squares [experts, columns] in float64, and numbers of rows."""

    def __init__(self, experts: int, columns: int, layer: int) -> None:
        self.sums = torch.zeros(experts, columns, dtype=torch.float64)
        self.counts = torch.zeros(experts, dtype=torch.float64)
        self.layer = layer

    def add(self, rows: Tensor) -> None:
        """Rows [..., columns] of an ordinary matrix."""
        flat = rows.reshape(-1, rows.shape[-1])
        if flat.shape[-1] == self.sums.shape[1]:
            self.sums[0] += flat.double().square().sum(0).cpu()
            self.counts[0] += len(flat)

    def add_each(self, rows: Tensor, expert: Tensor) -> None:
        """Rows [n, columns], each of its expert [n]."""
        self.sums.index_add_(0, expert.cpu(), rows.double().square().cpu())
        self.counts += torch.bincount(expert.cpu(), minlength=len(self.counts))

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        if not bool(self.sums.isfinite().all()):
            raise InputError(
                f"layer {self.layer} computes NaN or infinite values",
                hint="The checkpoint is damaged, or its weights overflow in this dtype.",
            )
        return self.sums.numpy(), self.counts.numpy()


def _head(matrices: Sequence[WeighedMatrix], *, datasets: list[str], chunks: int, size: int) -> GgufHead:
    """The part of the file before the tensors."""
    values: dict[str, str | int | list[str]] = {
        "general.type": "imatrix", "imatrix.datasets": datasets, "imatrix.chunk_count": chunks,
        "imatrix.chunk_size": size,
    }  # fmt: skip
    data, count = metadata_bytes(values)
    stacks = []
    for one in sorted(matrices, key=lambda m: m.name):
        for suffix, columns in ((SUMS, one.columns), (COUNTS, 1)):
            name = one.name + suffix
            stacks.append(Stack(name, "F32", (one.experts, columns), (name,)))
    return GgufHead(data, count, tuple(stacks))


def _without(unseen: Sequence[WeighedMatrix]) -> list[str]:
    """The warning about matrices that are not in the file."""
    if not unseen:
        return []
    more = f" and {len(unseen) - 1} more" if len(unseen) > 1 else ""
    return [f"{unseen[0].name}{more} is not in the file, since its columns are not those of the model's own matrix"]


def _is_imatrix(path: Path) -> bool:
    """Whether the file is an importance matrix in GGUF."""
    with open(path, "rb") as file:
        start = file.read(4096)
    return start[:4] == b"GGUF" and b"imatrix" in start


def _warnings(unused: Mapping[int, list[int]]) -> list[str]:
    return [
        f"layer {layer}: no token was routed to {counted(len(experts), 'expert')} "
        f"({', '.join(map(str, experts[:_NAMED]))}{', ...' if len(experts) > _NAMED else ''}), "
        "which have the mean importance of the layer; give more or other text"
        for layer, experts in unused.items()
    ]
