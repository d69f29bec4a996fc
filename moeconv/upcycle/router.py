"""Router rows from data, measured on the dense source: on the vectors that the router of the result will read.

A router reads what the FFN reads, the output of the norm. The rows are written to an overlay, under the target's names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moeconv.checkpoint.artifact import artifact_metadata
from moeconv.checkpoint.writer import writing_artifact
from moeconv.contract import RouterFigures, RouterLayer, SourceTokens
from moeconv.data.windows import TokenData, load_tokens, sequence_length
from moeconv.errors import InputError, UsageError
from moeconv.families.model import Model
from moeconv.options import SEQ_LEN, TOKENS, device_limit, parse_size
from moeconv.plan.kernels.arrays import raw_bytes
from moeconv.plan.meter import Meter, SilentMeter
from moeconv.plan.phases import phase
from moeconv.randomness import generator
from moeconv.stream.device import pick_device
from moeconv.stream.layer import Layer
from moeconv.stream.layers import start_meter, stream_within
from moeconv.units import counted
from moeconv.upcycle.centroids import balanced_centroids

_SAMPLE = 4096  # tokens per layer from which clusters and scales are computed, or
_PER_EXPERT = 16  # so many tokens per expert where those are more


@dataclass(frozen=True, eq=False)
class RouterInputs:
    """What the router of one layer would read: `means` float64 [sources, H], the mean direction of its inputs per
    source of data; `sample` float32 [n, H], some inputs, and `source` int64 [n], the source of each."""

    means: np.ndarray
    sample: np.ndarray
    source: np.ndarray


@phase("router")
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
    max_device_memory: str | None = None,
    meter: Meter | None = None,
) -> RouterFigures:
    """Write `experts` router rows for every layer in `names` (layer -> tensor name, float32 [experts, H]) to `path`.

    `hidden`: the mean direction of the router's inputs over each expert's data, one --data value per expert (as
    mergekit-moe's mode of that name, which averages hidden states; here it is what the router really reads).
    `centroid`: balanced k-means of those directions, over all data. The mean of a layer's rows is subtracted from each,
    which a softmax does not depend on. The rows then get the same length, and one factor per layer gives the logits a
    standard deviation of 1 over the sample.

    In the result, `load` is the share of the sample per first expert, and `own` the share of tokens whose first expert
    is that of their own data (`hidden` only).

    Raises UsageError for data that does not match the experts, InputError where two rows would be equal.
    """
    meter = meter or SilentMeter()
    _check_data(kind, experts, data)
    length = sequence_length(model, seq_len, default=SEQ_LEN)
    meter.note("reading the data")
    read = load_tokens(
        data, model.checkpoint.path, tokens=tokens or TOKENS, seq_len=length, seed=seed, text_field=text_field
    )
    chosen = _choose(read, max(_SAMPLE, _PER_EXPERT * experts), seed=seed)
    _check_tokens(kind, experts, data, read, len(chosen))
    budget = None if max_memory is None else parse_size(max_memory, flag="--max-memory")
    start_meter(meter, model, tokens=read.windows.size)
    stream = stream_within(
        model, read.windows, device=pick_device(device, device_limit(max_device_memory)),
        batch_size=batch_size, budget=budget, meter=meter,
        what="finding routers",
    )  # fmt: skip
    metadata = artifact_metadata(
        "overlay", identity=model.identity, router=kind, seed=seed, data=[s.to_json() for s in read.sources],
        tokens=read.tokens, seq_len=read.seq_len,
    )  # fmt: skip
    figures: list[RouterLayer] = []
    specs = [(name, "F32", (experts, model.hidden_size)) for name in names.values()]
    with writing_artifact(path, specs, metadata=metadata, overwrite=False) as writer:
        for layer in stream.layers():
            if layer.index not in names:
                continue
            inputs = _read_inputs(layer, read, chosen, width=model.hidden_size)
            rows = inputs.means if kind == "hidden" else balanced_centroids(
                _directions(inputs.sample), experts, seed=seed, layer=layer.index
            )  # fmt: skip
            rows = _scaled(rows, inputs.sample, layer.index)
            writer.write(names[layer.index], raw_bytes(rows))
            figures.append(_figures(rows, inputs, layer.index, own=kind == "hidden"))
    sources: list[SourceTokens] = [{"name": s.name, "tokens": s.tokens} for s in read.sources]
    return {"kind": kind, "tokens": read.tokens, "sources": sources, "layers": figures}


def _check_data(kind: str, experts: int, data: Sequence[str]) -> None:
    """Raises UsageError where the values of --data do not match the experts."""
    if not data:
        raise UsageError(f"--router {kind} needs --data", hint="hidden needs one --data per expert, centroid any text.")
    if kind == "hidden" and len(data) != experts:
        raise UsageError(
            f"--router hidden needs one --data value per expert: the numbers are {experts} and {len(data)}",
            hint="Give the values in the order of the experts. Several files for one expert go into a directory.",
        )


def _check_tokens(kind: str, experts: int, data: Sequence[str], read: TokenData, sampled: int) -> None:
    """Raises InputError where the tokens that were read give some expert no row."""
    empty = [s.name for i, s in enumerate(read.sources) if not (read.source == i).any()]
    if kind == "hidden" and (empty or len(read.sources) != len(data)):
        raise InputError(
            f"no tokens of {', '.join(empty) or 'some data'} are used, so that its expert would have no router row",
            hint="Raise --tokens, lower --seq-len, or give more text.",
        )
    if kind == "centroid" and sampled < experts:
        raise InputError(
            f"{counted(sampled, 'token is', 'tokens are')} too few for {experts} clusters", hint="Give more text."
        )


def _choose(read: TokenData, count: int, *, seed: int) -> np.ndarray:
    """The positions (window * seq_len + place) of the sampled tokens, sorted; every layer has the same sample."""
    order = generator((seed, "router sample")).permutation(read.tokens)
    return np.sort(order[:count])


def _read_inputs(layer: Layer, read: TokenData, chosen: np.ndarray, *, width: int) -> RouterInputs:
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
    return RouterInputs(
        sums / np.maximum(counts, 1)[:, None], np.concatenate(sample), read.source[chosen // read.seq_len]
    )


def _directions(vectors: np.ndarray) -> np.ndarray:
    directions: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return directions


def _scaled(rows: np.ndarray, sample: np.ndarray, layer: int) -> np.ndarray:
    """The rows without their mean, of equal length, with logits of standard deviation 1 over the sample: float32."""
    rows = rows - rows.mean(0, keepdims=True)
    lengths = np.linalg.norm(rows, axis=1)
    if len(rows) > 1 and lengths.min() < 1e-6:
        raise InputError(
            f"layer {layer}: the router inputs of two experts' data have the same mean direction",
            hint="Give each expert a text of its own.",
        )
    unit = rows / np.maximum(lengths, 1e-12)[:, None]
    spread = float((sample.astype(np.float64) @ unit.T).std())
    scaled: np.ndarray = (unit / max(spread, 1e-12)).astype(np.float32)
    return scaled


def _figures(rows: np.ndarray, inputs: RouterInputs, layer: int, *, own: bool) -> RouterLayer:
    first = (inputs.sample @ rows.T).argmax(1)
    load = np.bincount(first, minlength=len(rows)) / len(first)
    own_share = float((first == inputs.source).mean()) if own else None
    return {
        "layer": layer,
        "load": [round(float(x), 4) for x in load],
        "own": None if own_share is None else round(own_share, 4),
    }
