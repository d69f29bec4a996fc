"""`calibrate`: runs data through a model layer by layer, and writes a statistics file."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from moeconv.calibrate.artifact import KIND, write_statistics
from moeconv.calibrate.need import sample_size, sampled_fields
from moeconv.calibrate.neurons import KIND as NEURONS
from moeconv.calibrate.neurons import measure_neurons
from moeconv.calibrate.routing import load_of_layer
from moeconv.calibrate.state import EVERY, Fields, SavedProgress, run_key
from moeconv.calibrate.statistics import layer_statistics
from moeconv.calibrate.twin import structure
from moeconv.checkpoint.artifact import is_artifact
from moeconv.checkpoint.target import Inputs, check_file_target
from moeconv.contract import Load
from moeconv.data.windows import TokenData, load_tokens, sequence_length, split_windows
from moeconv.errors import UsageError
from moeconv.families.model import Model, open_model
from moeconv.families.rule import has_numbers, rule_of
from moeconv.options import NEURON_TOKENS, SEQ_LEN, TOKENS, DataOptions, device_limit, parse_size, reads_of
from moeconv.plan.meter import Meter, SilentMeter
from moeconv.plan.phases import phase
from moeconv.stream.device import pick_device
from moeconv.stream.layers import LayerStream, start_meter, stream_within
from moeconv.stream.prediction import prediction_layers
from moeconv.types import Config, JsonObject
from moeconv.world import current, deal, first


@phase("calibrate")
def calibrate(
    model_path: str | os.PathLike[str],
    stats_path: str | os.PathLike[str],
    *,
    data: Sequence[str],
    tokens: int | None = None,
    seq_len: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    text_field: str = "text",
    sample_tokens: int | None = None,
    max_memory: str | int | None = None,
    max_device_memory: str | int | None = None,
    overwrite: bool = False,
    save_every: float | None = EVERY,
    judge_every: int | None = None,
    meter: Meter | None = None,
) -> JsonObject:
    """Write the statistics of every MoE layer to `stats_path`, or of a dense model those of its neurons, which
    `upcycle --method split` reads. Returns a summary.

    A run that was interrupted resumes, when it is called again, at the last layer boundary that was saved beside
    `stats_path`; this happens at most every `save_every` seconds (None: never). Of several processes (torchrun), each
    runs its share of the windows, and the first one writes.

    `data` are values of `--data`. `tokens` tokens (None: 65536) are sampled from them, in sequences of `seq_len` tokens
    (None: 512, or the model's maximum where that is less). In each layer, `sample_tokens` tokens (None: see
    `need.sample_size`) go through all experts, to measure their similarity; of a dense model, the FFN inputs of as many
    tokens (None: 16384) are kept. With `judge_every` = n, every n-th window is held out
    (`windows.split_windows`).

    The summary has output, tokens, sample_tokens, memory, sources, seconds, warnings and layers [{layer, load, entropy,
    max_over_mean, dead}]. Raises InputError for data that cannot be used, OutputError if the file exists and
    `overwrite` is not set.
    """
    began = time.monotonic()
    meter = meter or SilentMeter()
    path, target = Path(stats_path), pick_device(device, device_limit(max_device_memory))
    budget = None if max_memory is None else parse_size(max_memory, flag="--max-memory")
    if sample_tokens is not None and sample_tokens < 1:
        raise UsageError("--sample-tokens must be at least 1")
    model = open_model(model_path)
    check_statistics_target(
        path, reads=[("the model", model_path), *reads_of({"data": data}, DataOptions)], overwrite=overwrite
    )
    length = sequence_length(model, seq_len, default=SEQ_LEN)
    meter.note("reading the data")
    read = first(
        lambda: load_tokens(
            data, model.checkpoint.path, tokens=tokens or TOKENS, seq_len=length, seed=seed, text_field=text_field
        )
    )
    read = read if judge_every is None else split_windows(read, every=judge_every)[0]
    start_meter(meter, model, tokens=read.windows.size)
    if not model.moe_layers:
        return _dense(
            model, read, path, dtype=dtype, device=target, batch_size=batch_size, max_memory=budget, meter=meter,
            seed=seed, sample_tokens=sample_tokens, overwrite=overwrite,
        )  # fmt: skip
    sample_tokens = sample_tokens or sample_size(read.tokens, top_k=model.top_k, num_experts=model.num_experts)
    mine, size = deal(len(read.windows), batch_size=batch_size, world=current())
    stream = stream_within(
        model, read.windows[mine], dtype=dtype, device=target, batch_size=size, budget=budget, meter=meter,
        what="calibrate", **sampled_fields(model, min(sample_tokens, read.tokens)),
    )  # fmt: skip
    key = run_key(stream, read, seed=seed, sample_tokens=sample_tokens)
    progress = SavedProgress(path, key=key, every=save_every, meter=meter)
    fields = _all_layers(stream, read, mine, progress, seed=seed, sample_tokens=sample_tokens)
    predicted = [layer for layer in model.mtp_layers if layer in fields]
    if current().leads:
        about = _provenance(stream, read, seed=seed, sample_tokens=sample_tokens)
        about |= {"prediction_layers": predicted} if predicted else {}
        write_statistics(path, fields, metadata=about, overwrite=overwrite)
    progress.remove()
    result = summary(path, fields, tokens=read.tokens, sources=[source.to_json() for source in read.sources])
    result["sample_tokens"] = min(sample_tokens, read.tokens)
    result["memory"] = stream.placement and stream.placement.to_json()
    return result | {"seconds": time.monotonic() - began, "warnings": _without_sample(model, fields)}


def _without_sample(model: Model, fields: Fields) -> list[str]:
    """A warning if a router did not follow the rule that moeconv has for it, which is a fault of moeconv."""
    lost = [layer for layer, of_layer in fields.items() if "sample_unit" not in of_layer]
    if not lost or not has_numbers(model):
        return []
    return [
        f"layer {lost[0]} ({len(lost)} such): the router of {model.family.model_type} chose other experts than the "
        f"rule "
        "that moeconv has for it, so no token sample is kept, and prune uses the criterion saliency; please report this"
    ]


def check_statistics_target(path: Path, *, reads: Inputs, overwrite: bool) -> None:
    """Raises OutputError, before any work, for a path to which a statistics file cannot be written."""
    check_file_target(
        path, what="statistics", reads=reads, overwrite=overwrite,
        replaces=lambda old: is_artifact(old, KIND, NEURONS),
    )  # fmt: skip


def summary(
    path: Path, fields: Mapping[int, Mapping[str, np.ndarray]], *, tokens: int, sources: Sequence[Config]
) -> JsonObject:
    """The summary of a statistics file: {output, tokens, sources [{name, tokens}], layers}."""
    return {
        "output": str(path),
        "tokens": tokens,
        "sources": [{"name": s["name"], "tokens": s["tokens"]} for s in sources],
        "layers": [_summary(layer, of_layer) for layer, of_layer in fields.items()],
    }


def _dense(
    model: Model, read: TokenData, path: Path, *, dtype: torch.dtype | None, device: torch.device, batch_size: int,
    max_memory: int | None, meter: Meter, seed: int, sample_tokens: int | None, overwrite: bool,
) -> JsonObject:  # fmt: skip
    """Measure the neurons of a dense model."""
    if current().size > 1:
        raise UsageError(
            "a dense model can be measured by one process only", hint="Start `moeconv calibrate` without torchrun."
        )
    stream = stream_within(
        model, read.windows, dtype=dtype, device=device, batch_size=batch_size, budget=max_memory, meter=meter,
        what="calibrate",
    )  # fmt: skip
    block = measure_neurons(
        stream, read, path, seed=seed, sample_tokens=sample_tokens or NEURON_TOKENS, overwrite=overwrite
    )
    sources = [{"name": s.name, "tokens": s.tokens} for s in read.sources]
    return {"output": str(path), "tokens": read.tokens, "sources": sources} | block


def _all_layers(
    stream: LayerStream, read: TokenData, mine: np.ndarray, progress: SavedProgress, *, seed: int, sample_tokens: int
) -> Fields:
    fields = progress.resume(stream)
    measured = partial(
        layer_statistics, source=torch.from_numpy(read.source), num_sources=len(read.sources),
        num_experts=stream.model.num_experts, seed=seed, sample_tokens=sample_tokens, mine=torch.from_numpy(mine),
        rule=rule_of(stream.model),
    )  # fmt: skip
    for layer in stream.layers():
        if layer.experts is not None:
            fields[layer.index] = measured(layer)
        else:
            layer.run_all()
        if layer.index + 1 < stream.model.num_layers:
            progress.save(stream, layer.index + 1, fields)
    for found in prediction_layers(stream):
        fields[found.number] = measured(found.layer, hidden=found.hidden)
    return fields


def _provenance(stream: LayerStream, read: TokenData, *, seed: int, sample_tokens: int) -> JsonObject:
    model = stream.model
    return {
        "identity": model.identity,
        "structure": structure(model),
        "model_type": model.family.model_type,
        "layers": list(model.moe_layers),
        "num_experts": model.num_experts,
        "top_k": model.top_k,
        "tokens": read.tokens,
        "sources": [source.to_json() for source in read.sources],
        "seq_len": read.seq_len,
        "seed": seed,
        "sample_tokens": sample_tokens,
        "sampled_tokens": min(sample_tokens, read.tokens),
        "dtype": str(stream.dtype).removeprefix("torch."),
    }


def _summary(layer: int, fields: Mapping[str, np.ndarray]) -> Load:
    entropy, tokens = fields["entropy_sum"].sum(), fields["tokens"].sum()
    return load_of_layer(layer, fields["count"].sum(axis=0), entropy_sum=entropy, tokens=tokens)
