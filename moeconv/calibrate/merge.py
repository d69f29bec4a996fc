"""Adds statistics files of one model. The result is what one calibration on all of their data would have given.

Sums are added. The mean cosine of outputs on a token sample becomes the mean over all samples.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from moeconv.calibrate.artifact import PER_SOURCE, Statistics, load_statistics, write_statistics
from moeconv.calibrate.run import check_statistics_target, summary
from moeconv.calibrate.sample import SAMPLE, joined
from moeconv.calibrate.statistics import logit_correlation
from moeconv.errors import InputError, UsageError, escape
from moeconv.families.model import open_model
from moeconv.types import JsonObject

_SAME = ("identity", "layers", "prediction_layers", "num_experts", "top_k", "seq_len", "dtype")
_OF_SOURCES = (*PER_SOURCE, "entropy_sum", "tokens")
_ADDED = ("coactivation", "logit_sum", "logit_product")
_PART = ("tokens", "sources", "seed", "sample_tokens", "sampled_tokens")

Fields = dict[str, np.ndarray]


def merge_statistics(
    model_path: str | os.PathLike[str],
    stats_path: str | os.PathLike[str],
    files: Sequence[str | os.PathLike[str]],
    *,
    overwrite: bool = False,
) -> JsonObject:
    """Write the sum of two or more statistics files of a model to `stats_path`. Returns the summary of `calibrate`.

    Sources are distinguished by their hash, and `merged` in the provenance lists the provenance of each file. If two
    files drew from the same source with different seeds, a warning says that the draws may overlap.

    Raises UsageError for less than two files; InputError for files of another model or with other settings, and for two
    files that drew from the same source with the same seed, because their tokens would count twice.
    """
    began = time.monotonic()
    if len(files) < 2:
        raise UsageError("--merge needs at least two statistics files", hint="Repeat the option: --merge A --merge B.")
    model, path = open_model(model_path), Path(stats_path)
    reads = [("the model", model_path), *(("--merge", file) for file in files)]
    check_statistics_target(path, reads=reads, overwrite=overwrite)
    loaded = [load_statistics(file) for file in files]
    for one in loaded:
        one.check_belongs(model)
    warnings = _check(loaded)
    sources = _sources(loaded)
    layers = (*loaded[0].layers, *loaded[0].prediction_layers)
    places = [[_place(sources, s) for s in one.metadata["sources"]] for one in loaded]
    fields = {layer: _layer(loaded, layer, places, len(sources)) for layer in layers}
    metadata = _provenance(loaded, sources)
    write_statistics(path, fields, metadata=metadata, overwrite=overwrite)
    result = summary(path, fields, tokens=metadata["tokens"], sources=sources)
    return result | {"seconds": time.monotonic() - began, "warnings": warnings}


def _parts(one: Statistics) -> list[JsonObject]:
    """The provenance of each measurement in a file: one, or one per file that it was added from."""
    return one.metadata.get("merged") or [{key: one.metadata.get(key) for key in _PART}]


def _check(loaded: Sequence[Statistics]) -> list[str]:
    """Warnings about sources that overlap. Raises InputError for files that cannot be added."""
    first = loaded[0]
    for other in loaded[1:]:
        for key in _SAME:
            ours, theirs = first.metadata.get(key), other.metadata.get(key)
            if ours != theirs:
                raise InputError(
                    f"{first.file.label} and {other.file.label} differ in {key}: {escape(ours)} and {escape(theirs)}",
                    hint="Only statistics of the same model with the same settings can be added: calibrate again "
                    "for one of them.",
                )
    seen: dict[str, tuple[object, str]] = {}
    warnings = []
    for one in loaded:
        fresh: dict[str, tuple[object, str]] = {}
        for part in _parts(one):
            for source in part["sources"]:
                before = seen.get(source["sha256"])
                if before is not None and before[0] == part["seed"]:
                    raise InputError(
                        f"{before[1]} and {one.file.label} both drew from {escape(source['name'])} with the "
                        f"seed {escape(part['seed'])}, so its tokens would count twice",
                        hint="Calibrate one of them on other data, or with another --seed.",
                    )
                if before is not None:
                    name = escape(source["name"])
                    warnings.append(
                        f"{before[1]} and {one.file.label} both drew from {name}, so some tokens may count twice"
                    )
                fresh[source["sha256"]] = (part["seed"], one.file.label)
        seen |= fresh
    return warnings


def _sources(loaded: Sequence[Statistics]) -> list[JsonObject]:
    """Every source once, distinguished by its hash, with its tokens of all files."""
    found: dict[str, JsonObject] = {}
    for one in loaded:
        for source in one.metadata["sources"]:
            known = found.setdefault(source["sha256"], source | {"tokens": 0})
            known["tokens"] += source["tokens"]
    return list(found.values())


def _place(sources: Sequence[JsonObject], source: JsonObject) -> int:
    return next(i for i, s in enumerate(sources) if s["sha256"] == source["sha256"])


def _layer(loaded: Sequence[Statistics], layer: int, places: Sequence[Sequence[int]], sources: int) -> Fields:
    """The added fields of one layer. `places` are the rows of each file's sources among all `sources`."""
    fields: Fields = {}
    for name in _OF_SOURCES:
        parts = [one.layer(layer, name) for one in loaded]
        fields[name] = np.zeros((sources, *parts[0].shape[1:]))
        for part, at in zip(parts, places):
            np.add.at(fields[name], np.asarray(at), part)
    for name in _ADDED:
        fields[name] = np.sum([one.layer(layer, name) for one in loaded], axis=0)
    counts = np.stack([one.layer(layer, "count").sum(0) for one in loaded])  # [files, E]
    share = counts / np.maximum(counts.sum(0), 1)
    means = np.stack([one.layer(layer, "out_mean").astype(np.float64) for one in loaded])  # [files, E, H]
    mean = np.einsum("fe,feh->eh", share, means)
    apart = np.square(means - mean).sum(-1)  # [files, E]
    within = np.stack([one.layer(layer, "out_var") for one in loaded])
    fields |= {"out_mean": mean.astype(np.float32), "out_var": (share * (within + apart)).sum(0)}
    sampled = np.array([float(one.metadata["sampled_tokens"]) for one in loaded])
    cosines = np.stack([one.layer(layer, "output_cosine") for one in loaded])
    fields["output_cosine"] = np.clip(np.einsum("f,fij->ij", sampled / sampled.sum(), cosines), -1, 1)
    fields["router_cosine"] = np.array(loaded[0].layer(layer, "router_cosine"))
    total, products = (torch.from_numpy(fields[name]) for name in ("logit_sum", "logit_product"))
    tokens = torch.tensor(fields["tokens"].sum())
    fields["logit_correlation"] = logit_correlation(total, products, tokens).numpy()
    samples = [{n: one.layer(layer, n) for n in SAMPLE if one.has(layer, n)} for one in loaded]
    return fields | joined(samples)


def _provenance(loaded: Sequence[Statistics], sources: Sequence[JsonObject]) -> JsonObject:
    metadata = {k: v for k, v in loaded[0].metadata.items() if k not in ("kind", "version")}
    for key in ("tokens", "sample_tokens", "sampled_tokens"):
        metadata[key] = sum(one.metadata[key] for one in loaded)
    merged = [part for one in loaded for part in _parts(one)]
    return metadata | {"sources": list(sources), "merged": merged}
