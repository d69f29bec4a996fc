"""Router rows from data, before there is a router: measured on the dense SOURCE, on the vector that it will read.

A router reads what the FFN reads, behind the norm. Rows become an overlay artifact, named as the target names them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeconv.checkpoint.artifact import artifact_metadata
from moeconv.checkpoint.writer import writing_artifact
from moeconv.data.windows import TokenData, load_tokens, sequence_length
from moeconv.errors import InputError, UsageError
from moeconv.families.model import Model
from moeconv.options import SEQ_LEN, TOKENS, parse_size
from moeconv.plan.kernels.arrays import raw_bytes
from moeconv.plan.meter import Meter, SilentMeter
from moeconv.randomness import generator
from moeconv.stream.layer import Layer
from moeconv.stream.layers import pick_device, start_meter, stream_within
from moeconv.upcycle.centroids import balanced_centroids

_SAMPLE = 4096  # tokens a layer that clusters and scales are taken from, and at least
_PER_EXPERT = 16  # so many an expert


@dataclass(frozen=True, eq=False)
class _Seen:
    """Of one layer: `means` [sources, H] of the directions of the router's inputs by source, `sample` [n, H] inputs and
    the source of each."""

    means: np.ndarray
    sample: np.ndarray
    source: np.ndarray


def measure_router(
    model: Model,
    path: Path,
    *,
    kind: str,
    names: Mapping[int, str],
    experts: int,
    data: Sequence[str],
    tokens: int | None = None,
    seq_len: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    seed: int = 0,
    text_field: str = "text",
    max_memory: str | None = None,
    meter: Meter | None = None,
) -> dict[str, Any]:
    """Write `experts` router rows of every layer in `names` (layer -> tensor name, float32 [experts, H]) to `path`.

    `hidden`: the mean direction of the router's inputs over each expert's data, one --data value per expert (as
    mergekit-moe's mode of that name, which averages hidden states; here it is what the router really reads).
    `centroid`: balanced k-means of those directions, over all data. The part that all rows share is taken out, which no
    softmax sees, rows get one length, and one factor a layer gives logits a standard deviation of 1 over the sample.
    Returns {kind, tokens, sources, layers [{layer, load, own}]}: shares of the sample's tokens by their first expert,
    and the share of tokens whose first expert is their data's own (hidden).
    Raises UsageError for data that do not match the experts, InputError for inputs that cannot be told apart.
    """
    meter = meter or SilentMeter()
    if not data:
        raise UsageError(f"--router {kind} needs --data", hint="hidden: one --data per expert; centroid: any text.")
    if kind == "hidden" and len(data) != experts:
        raise UsageError(
            f"--router hidden with {experts} experts needs one --data value per expert; {len(data)} are given",
            hint="Give them in the order of the experts; several files of one expert go into a directory.",
        )
    length = sequence_length(model, seq_len, default=SEQ_LEN)
    meter.note("reading the data")
    read = load_tokens(
        data, model.checkpoint.path, tokens=tokens or TOKENS, seq_len=length, seed=seed, text_field=text_field
    )
    empty = [s.name for i, s in enumerate(read.sources) if not (read.source == i).any()]
    if kind == "hidden" and (empty or len(read.sources) != len(data)):
        raise InputError(
            f"no tokens of {', '.join(empty) or 'some data'} are used: its expert would have no router row",
            hint="Raise --tokens, lower --seq-len, or give more text.",
        )
    budget = None if max_memory is None else parse_size(max_memory, flag="--max-memory")
    start_meter(meter, model)
    stream = stream_within(
        model, read.windows, device=pick_device(device), batch_size=batch_size, budget=budget, meter=meter,
        what="finding routers",
    )  # fmt: skip
    chosen = _choose(read, max(_SAMPLE, _PER_EXPERT * experts), seed=seed)
    if kind == "centroid" and len(chosen) < experts:
        raise InputError(f"{len(chosen)} tokens cannot make {experts} clusters", hint="Give more text.")
    metadata = artifact_metadata(
        "overlay", identity=model.identity, router=kind, seed=seed, data=[s.to_json() for s in read.sources],
        tokens=read.tokens, seq_len=read.seq_len,
    )  # fmt: skip
    figures: list[dict[str, Any]] = []
    specs = [(name, "F32", (experts, model.hidden_size)) for name in names.values()]
    with writing_artifact(path, specs, metadata=metadata, overwrite=False) as writer:
        for layer in stream.layers():
            if layer.index not in names:
                continue
            seen = _look(layer, read, chosen, width=model.hidden_size)
            rows = seen.means if kind == "hidden" else balanced_centroids(
                _directions(seen.sample), experts, seed=seed, layer=layer.index
            )  # fmt: skip
            rows = _scaled(rows, seen.sample, layer.index)
            writer.write(names[layer.index], raw_bytes(rows))
            figures.append(_figures(rows, seen, layer.index, own=kind == "hidden"))
    sources = [{"name": s.name, "tokens": s.tokens} for s in read.sources]
    return {"kind": kind, "tokens": read.tokens, "sources": sources, "layers": figures}


def _choose(read: TokenData, count: int, *, seed: int) -> np.ndarray:
    """Sorted positions (window * seq_len + place) of the tokens that every layer's sample takes."""
    order = generator((seed, "router sample")).permutation(read.tokens)
    return np.sort(order[:count])


def _look(layer: Layer, read: TokenData, chosen: np.ndarray, *, width: int) -> _Seen:
    sums = np.zeros((len(read.sources), width))
    counts = np.bincount(read.source, minlength=len(read.sources)) * read.seq_len
    sample: list[np.ndarray] = []
    for batch in layer.batches():
        x = batch.ffn_input.double()
        directions = (x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)).reshape(-1, read.seq_len, x.shape[-1]).sum(1)
        np.add.at(sums, read.source[batch.rows], directions.cpu().numpy())
        first, last = batch.rows.start * read.seq_len, batch.rows.stop * read.seq_len
        inside = chosen[(chosen >= first) & (chosen < last)] - first
        sample.append(batch.ffn_input[torch.from_numpy(inside)].float().cpu().numpy())
    return _Seen(sums / np.maximum(counts, 1)[:, None], np.concatenate(sample), read.source[chosen // read.seq_len])


def _directions(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _scaled(rows: np.ndarray, sample: np.ndarray, layer: int) -> np.ndarray:
    """Rows without their common part, of one length, with logits of standard deviation 1 over the sample."""
    rows = rows - rows.mean(0, keepdims=True)
    lengths = np.linalg.norm(rows, axis=1)
    if len(rows) > 1 and lengths.min() < 1e-6:
        raise InputError(
            f"layer {layer}: the router inputs of two experts' data cannot be told apart",
            hint="Give each expert text of its own.",
        )
    unit = rows / np.maximum(lengths, 1e-12)[:, None]
    spread = float((sample.astype(np.float64) @ unit.T).std())
    return (unit / max(spread, 1e-12)).astype(np.float32)


def _figures(rows: np.ndarray, seen: _Seen, layer: int, *, own: bool) -> dict[str, Any]:
    first = (seen.sample @ rows.T).argmax(1)
    load = np.bincount(first, minlength=len(rows)) / len(first)
    hit = float((first == seen.source).mean()) if own else None
    return {"layer": layer, "load": [round(float(x), 4) for x in load], "own": None if hit is None else round(hit, 4)}
