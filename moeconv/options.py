"""Every parameter of every step, declared once: flag names, recipe keys and API parameter names are these words.

A group is a frozen dataclass; a field's metadata holds its help text and its choices: words, or the place of the
registry that has them (`choices_of` reads both).
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, TypeVar

from moeconv.errors import UsageError, did_you_mean, escape

T = TypeVar("T")

# defaults that help texts state, and that the code takes from here
TOKENS, SEQ_LEN = 65536, 512
EVALUATE_SEQ_LEN = 256
SAMPLE_TOKENS, LEAST_SAMPLE = 2048, 256  # per layer of a Mixture-of-Experts
NEURON_TOKENS = 16384  # per layer of a dense model
EXPERTS, TOP_K = 8, 2
LOOKS = 4
SCOPES = ("experts", "experts+shared", "all-linear")


Reads = Literal["", "model", "file", "data"]


_FORMAT_WORDS = "moeconv.quantize.formats:help_words"


def option(
    default: Any, help: str, *, choices: tuple[str, ...] | str = (), words: str = "", reads: Reads = ""
) -> Any:  # fmt: skip
    """A dataclass field with its help text.

    `choices` are the words that it takes, or "module:name" of a registry or a function that gives them: imported when
    they are asked for, so that the words of a registry stand in one place and `--help` stays quick. In the same way
    `words` is the place of a function that gives what stands in braces in `help`.
    `reads` says what the command reads at the path that is the value, so that no output can replace it: a model's
    directory, a file, or data (a file or a directory, FILE=WEIGHT).
    """
    return field(default=default, metadata={"help": help, "choices": choices, "words": words, "reads": reads})


@dataclass(frozen=True)
class ReadOptions:
    """How checkpoints are read."""

    follow_links: bool = option(
        False, "Let files of a checkpoint be links that leave its directory, as old downloads with --local-dir have."
    )


@dataclass(frozen=True)
class PlanOptions:
    """What shapes the files of every written checkpoint."""

    seed: int = option(0, "Seed of every random draw.")
    dtype: str | None = option(
        None,
        "Dtype of the weights that are written (default: the source's).",
        choices=("bfloat16", "float16", "float32"),
    )
    shard_size: str = option("5GB", "Largest size of an output shard.")
    shard_by: str = option(
        "size",
        "How tensors are grouped into shards: in order up to the size, one shard per layer, or one per expert.",
        choices=("size", "layer", "expert"),
    )


@dataclass(frozen=True)
class WriteOptions:
    """How a checkpoint is written."""

    dry_run: bool = option(False, "Stop after the plan: print what would be written, and write nothing.")
    no_check: bool = option(False, "Skip the check of the written model against the source.")
    strict: bool = option(False, "Refuse what would otherwise be a warning (NaN in a source tensor).")
    jobs: int | None = option(None, "Workers (default: the processors, at most 4).")
    part: str | None = option(
        None,
        "Write only share I of N of the shards, given as I/N with I from 0; the share that finishes last "
        "completes OUT.",
    )
    overwrite: bool = option(
        False, "Replace an existing OUT when the new directory is complete. OUT must be empty, an output of "
        "moeconv, or a single checkpoint with nothing else in it."
    )  # fmt: skip


@dataclass(frozen=True)
class DryOptions:
    """Whether anything is run."""

    dry_run: bool = option(False, "Print how much memory the command will take, and stop: run nothing, write nothing.")


@dataclass(frozen=True)
class MeasureOptions:
    """How a model is run."""

    device: str = option("auto", "Device to compute on.", choices=("auto", "cpu", "cuda"))
    max_memory: str | None = option(None, "Most memory to use, such as 16GB (default: what is free).")
    batch_size: int = option(8, "Sequences per forward pass.")
    seq_len: int | None = option(
        None, f"Tokens per sequence (default: {SEQ_LEN}, evaluate: {EVALUATE_SEQ_LEN}; at most the model's)."
    )
    tokens: int | None = option(
        None, f"Tokens to use, sampled with the seed (default: {TOKENS}; evaluate: all; tune by distill or lm: as many "
        "as its steps take)."
    )  # fmt: skip
    text_field: str = option(
        "text", "Name of the record field that holds the text (default: text, otherwise messages or conversations)."
    )


@dataclass(frozen=True)
class DataOptions:
    """Text to run a model on."""

    data: tuple[str, ...] = option(
        (), "A file of text, JSON, JSON lines, CSV or Parquet; a directory; - for standard input; or "
        "hf://datasets/OWNER/NAME[:CONFIG[:SPLIT]]. Repeatable; FILE=WEIGHT sets a weight.", reads="data"
    )  # fmt: skip


@dataclass(frozen=True)
class UpcycleOptions:
    """moeconv upcycle"""

    experts: int | None = option(
        None, f"Experts per layer (default: {EXPERTS}; with --experts-from one per sibling; of an MoE source twice its "
        "own)."
    )  # fmt: skip
    top_k: int | None = option(
        None, f"Experts per token (default: {TOP_K}, or all pieces of one copy of the FFN; of an MoE source its own, "
        "times the copies)."
    )  # fmt: skip
    method: str = option(
        "copy",
        "How experts are made from the FFN.",
        choices="moeconv.upcycle.methods:METHODS",
    )
    experts_from: tuple[str, ...] = option(
        (), "A sibling of SOURCE whose FFNs become the next expert; repeatable, in the order of the experts.",
        reads="model",
    )  # fmt: skip
    to: str | None = option(None, "Target family (default: the one that most runtimes serve).")
    layers: str = option(
        "all",
        "Layers to convert: all, or numbers and ranges such as 0,2,8-15; split: auto:N for the N layers that it costs "
        "least.",
    )
    granularity: int | None = option(
        None,
        "Pieces into which each copy of the FFN is cut, one expert per piece (default: 1; granular and shuffle: 2).",
    )
    shared_experts: str | None = option(
        None, "Part of the FFN that an always-on expert holds: full (all of it; routed experts then start by adding "
        "nothing), a share of its neurons such as 0.25, or a number of --granularity pieces (default: none).",
    )  # fmt: skip
    router: str = option(
        "random", "Rows of the router: random; hidden (the mean of the router's inputs, one --data per "
        "expert); centroid (balanced clusters of its inputs).", choices=("random", "hidden", "centroid"),
    )  # fmt: skip
    router_std: float = option(0.02, "Standard deviation of the router's random rows.")
    drop_ratio: float = option(0.5, "drop and shuffle: share of an expert's neurons that are redrawn.")
    noise_scale: float = option(0.05, "noise: standard deviation, in units of the matrix's own.")
    noise_fraction: float = option(0.5, "noise: share of an expert's neurons that get noise.")
    clustering: str = option(
        "refined", "split: how neurons are grouped.", choices=("refined", "magnitude", "binary", "random")
    )
    stats: str | None = option(
        None, "split: neuron statistics of the dense model from `moeconv calibrate`.", reads="file"
    )


@dataclass(frozen=True)
class StatisticsOptions:
    """How --stats are taken."""

    stats_of_twin: bool = option(
        False,
        "Accept --stats of the same model in another dtype or quantization; statistics of another model are refused.",
    )


@dataclass(frozen=True)
class PruneOptions:
    """moeconv prune"""

    keep: int | None = option(None, "Experts to keep in every layer.")
    ratio: float | None = option(None, "Share of the experts to remove, such as 0.5.")
    max_bytes: str | None = option(None, "Largest size of the result, such as 20GB; removes as few as fit.")
    max_loss_increase: float | None = option(
        None, "Remove as many experts as possible while the loss on --data rises by at most this (nats per token)."
    )
    threshold: float | None = option(
        None, "Remove only experts for which another one is at least this similar, such as 0.8 (redundancy)."
    )
    criterion: str | None = option(
        None, "How the experts to remove are chosen (default: reconstruction with data, aimer without).",
        choices="moeconv.prune.criteria:CRITERIA",
    )  # fmt: skip
    similarity: str = option(
        "output",
        "Measure of the similarity of experts (redundancy, merge).",
        choices=("output", "aligned", "raw", "router"),
    )
    stats: str | None = option(None, "Statistics from `moeconv calibrate`.", reads="file")
    refit: bool = option(
        False, "Refit the down_proj of the kept experts on --data to the output of the unpruned layer."
    )
    refit_strength: float = option(0.3, "Ridge of --refit, in units of the mean squared activation.")
    refit_sweeps: int = option(2, "Passes of --refit over the experts of a layer.")
    rescale: bool | None = option(
        None, "Fold the least-squares scale into down_proj (default: where the router does not renormalise)."
    )
    sequential: bool = option(
        False, "Choose the experts of each layer with the layers before it already pruned (--data)."
    )
    merge: bool = option(False, "Average each removed expert into the most similar kept one, with aligned neurons.")
    distill: int = option(0, "Steps of router distillation from the unpruned model on --data, such as 100.")
    top_k: int | None = option(None, "Experts per token of the result; this option alone removes no expert.")
    curve: bool = option(
        False, "Print the loss and KL on --data for every ratio, and write no model (OUT: .json, .png, .svg)."
    )
    protect_coverage: float | None = option(
        None, "For each data source, keep the experts that make up this share of its saliency, such as 0.5."
    )
    target: tuple[str, ...] = option(
        (), "Runtime that must run the result: transformers, vllm, sglang or llama.cpp; repeatable."
    )
    protect: str | None = option(None, "Experts to keep, as LAYER:EXPERT pairs such as 0:3,5:1 or *:0.")


@dataclass(frozen=True)
class QuantizeOptions:
    """moeconv quantize"""

    format: str = option("compressed-tensors", "Layout on disk.", choices="moeconv.quantize.formats:FORMATS")
    scheme: str | None = option(
        None, "Number format (default: the format's first of 4 bits); mixed: bits by layer.",
        choices="moeconv.quantize.formats:scheme_words",
    )  # fmt: skip
    bits: int | None = option(None, "{bits}: short for the format's usual scheme of that width.", words=_FORMAT_WORDS)
    group_size: str = option("auto", "Weights per scale: auto, channel, or {group_sizes}.", words=_FORMAT_WORDS)
    method: str = option(
        "rtn", "How codes are chosen: rtn rounds to nearest, mse searches the scales of least error, gptq uses --data.",
        choices=("rtn", "mse", "gptq"),
    )  # fmt: skip
    average_bits: float | None = option(None, "mixed: bits per expert weight, scales included, such as 5.")
    max_bytes: str | None = option(None, "mixed: largest size of the result, such as 20GB.")
    stats: str | None = option(
        None, "mixed: statistics from `moeconv calibrate`, for the layers' importance.", reads="file"
    )
    damping: float = option(0.01, "gptq: added to the Hessian's diagonal, in units of its mean.")
    scope: str = option(
        "experts", "Weights to pack; the router, embeddings, norms and lm_head are never packed.", choices=SCOPES
    )
    target: tuple[str, ...] = option(
        (), "Runtime that must load the result: transformers, vllm, sglang or llama.cpp; repeatable."
    )
    self_contained: bool = option(
        False, "{self_contained}: write the loader's code beside the weights, for trust_remote_code=True without "
        "moeconv.", words=_FORMAT_WORDS,
    )  # fmt: skip
    double_quant: bool = option(False, "Quantize the scales too ({nesting}).", words=_FORMAT_WORDS)
    requantize: bool = option(
        False, "Accept a source that is already quantized (FP8, MXFP4, ...): each weight is decoded, then packed."
    )


@dataclass(frozen=True)
class CalibrateOptions:
    """moeconv calibrate"""

    sample_tokens: int | None = option(
        None, f"Tokens per layer on which all experts are compared (default: {SAMPLE_TOKENS}, with many experts fewer, "
        f"at least {LEAST_SAMPLE}), or whose FFN inputs are kept (dense, default: {NEURON_TOKENS})."
    )  # fmt: skip


@dataclass(frozen=True)
class TuneOptions:
    """moeconv tune"""

    objective: str = option("layerwise", "What the training minimises.", choices=("layerwise", "distill", "lm"))
    teacher: str | None = option(
        None, "The dense source, or the model before it was edited (required by layerwise and distill).", reads="model"
    )
    train: str = option("router", "Parts to train, separated by commas: router, experts, shared, norms.")
    steps: int = option(100, "Optimiser steps (per layer with layerwise).")
    learning_rate: float | None = option(
        None, "Peak learning rate of everything that trains (default: by width, objective and --train)."
    )
    schedule: str = option(
        "cosine", "The learning rate after the warmup: falling to a tenth of the peak, or constant.",
        choices=("cosine", "linear", "constant"),
    )  # fmt: skip
    warmup: float = option(0.1, "Share of the steps in which the rate rises to its peak.")
    look_every: int | None = option(
        None, f"Steps between looks at the held-out tenth of the data; the best look is kept (default: {LOOKS} looks)."
    )
    patience: int | None = option(None, "Stop early after this many looks without improvement (default: all steps).")
    balance: float = option(0.01, "Weight of the load-balance loss, taken per layer.")
    bias_update: float = option(
        0.0, "Move the router's correction bias by this much after each step, towards an even load, in families that "
        "have one; 0.001 is usual (default: off)."
    )  # fmt: skip
    z_loss: float = option(0.0, "Weight of the router z-loss.")
    router_noise: float = option(0.0, "While training: standard deviation of noise on the router's logits.")
    temperature: float = option(1.0, "While training: divisor of the router's logits.")
    capacity_factor: float | None = option(
        None, "While training: an expert takes at most ceil(F * tokens * top-k / experts) tokens of a batch, those "
        "with the largest weights (default: no limit)."
    )  # fmt: skip
    straight_through: bool | None = option(
        None, "Router gradient through all experts, DenseMixer (default: unless experts train too, and where the one "
        "weight of a token is always 1)."
    )  # fmt: skip
    balance_only: bool = option(False, "Train on the balance loss alone, also where experts are identical.")


@dataclass(frozen=True)
class EvaluateOptions:
    """moeconv evaluate"""

    reference: str | None = option(None, "Model to compare with: KL, agreement, loss increase.", reads="model")
    max_loss_increase: float | None = option(None, "Gate: loss at most this much above the reference (nats per token).")
    max_kl: float | None = option(None, "Gate: KL(reference || model) at most this (nats per token).")
    min_agreement: float | None = option(None, "Gate: share of tokens with the reference's top-1 at least this.")


@dataclass(frozen=True)
class ArtifactOptions:
    """How a single file is written."""

    overwrite: bool = option(False, "Replace the file, of the same kind, when the new one is complete.")


@dataclass(frozen=True)
class SeedOptions:
    """What random draws begin with."""

    seed: int = option(0, "Seed of every random draw.")


@dataclass(frozen=True)
class MergeOptions:
    """moeconv calibrate, of files instead of data"""

    merge: tuple[str, ...] = option(
        (), "Instead of running data: add these statistics files; repeatable.", reads="file"
    )


@dataclass(frozen=True)
class SampleOptions:
    """What is drawn of the data."""

    seed: int = option(0, "Seed of the sample when --tokens is given.")


@dataclass(frozen=True)
class VerifyOptions:
    """moeconv verify"""

    source: str | None = option(None, "Compare unchanged tensors with this checkpoint.", reads="model")
    load: bool = option(False, "Also load the model in transformers, strictly, and run it.")


@dataclass(frozen=True)
class ReportOptions:
    """moeconv report"""

    stats: str | None = option(
        None, "Statistics from `moeconv calibrate`, of this model or of one it was made from.", reads="file"
    )
    results: tuple[str, ...] = option((), "JSON that a command printed with --json; repeatable.", reads="file")
    reference: str | None = option(None, "Checkpoint to compare sizes with, such as the dense source.", reads="model")
    title: str | None = option(None, "Title of the page (default: the directory's name).")


@dataclass(frozen=True)
class RunOptions:
    """moeconv run"""

    set: tuple[str, ...] = option((), "Set a variable of the recipe: KEY=VALUE; repeatable.")
    dry_run: bool = option(False, "Print the steps and sizes, write nothing.")


@dataclass(frozen=True)
class DemoOptions:
    """moeconv demo"""

    where: bool = option(False, "Only say where its model and texts lie.")


def reads_of(
    values: Mapping[str, Any], *groups: type, kinds: tuple[Reads, ...] = ("model", "file", "data")
) -> list[tuple[str, str]]:
    """(flag, path) of everything that the options of these groups name in `values`, hub names (hf://) among them; not
    standard input.

    Data may be FILE=WEIGHT, and a file may have a `=` in its name: both are given.
    """
    found: list[tuple[str, str]] = []
    for f in (f for group in groups for f in dataclasses.fields(group)):
        kind, value = f.metadata["reads"], values.get(f.name)
        if kind not in kinds or not value:
            continue
        for path in map(str, (value,) if isinstance(value, str | os.PathLike) else value):
            found.append((flag_of(f.name), path))
            if kind == "data" and "=" in path:
                found.append((flag_of(f.name), path.rpartition("=")[0]))
    return [(flag, path) for flag, path in found if path not in ("", "-")]


_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*$", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_size(text: str | int, *, flag: str) -> int:
    """`5GB`, `500MB`, `2GiB`, `1000` -> bytes. Raises UsageError naming the flag."""
    match = _SIZE.match(str(text))
    if not match:
        raise UsageError(f"{flag} {escape(text)}: not a size", hint="Examples: 5GB, 500MB, 2GiB.")
    number, unit, binary = match.groups()
    size = float(number) * (1024 if binary else 1000) ** _POWERS[unit.upper()]
    if size >= 2**63:
        raise UsageError(f"{flag} {escape(text)}: too large", hint="Examples: 5GB, 500MB, 2GiB.")
    return int(size)


def parse_index(text: str) -> int | None:
    """A whole number from 0 up in plain digits, else None."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else None


def parse_layers(text: str, *, layers: int, flag: str = "--layers") -> tuple[int, ...]:
    """`all` or `0,2,8-15` -> sorted layer indices. Raises UsageError for one outside the model."""
    if text.strip() == "all":
        return tuple(range(layers))
    chosen: set[int] = set()
    for word in text.split(","):
        first, dash, last = word.strip().partition("-")
        try:
            a = int(first)
            b = int(last) if last else (layers - 1 if dash else a)
        except ValueError:
            raise UsageError(
                f"{flag} {escape(text)}: {escape(word)!r} is no number or range", hint="Example: 0,2,8-15."
            ) from None
        if not 0 <= a <= b < layers:
            raise UsageError(f"{flag} {escape(text)}: {escape(word)} is outside layers 0 to {layers - 1}")
        chosen.update(range(a, b + 1))
    return tuple(sorted(chosen))


def choices_of(parameter: dataclasses.Field[Any]) -> tuple[str, ...]:
    """The words that a parameter takes, () where any will do. Raises InputError where a package that adds one is
    broken."""
    choices = parameter.metadata["choices"]
    return tuple(_found(choices) if isinstance(choices, str) else choices)


def help_of(parameter: dataclasses.Field[Any]) -> str:
    """The help text of a parameter, with the words of the registries in it."""
    help: str = parameter.metadata["help"]
    words: str = parameter.metadata["words"]
    return help.format_map(_found(words)) if words else help


def _found(place: str) -> Any:
    """What lies at "module:name"; of a function, what it gives."""
    module, _, name = place.partition(":")
    found = getattr(import_module(module), name)
    return found() if callable(found) else found


def from_keywords(group: type[T], values: Mapping[str, Any]) -> T:
    """The group's dataclass from the values that it names. Raises UsageError for a value outside its choices."""
    names = {f.name for f in dataclasses.fields(group)}  # type: ignore[arg-type]
    made = group(**{k: v for k, v in values.items() if k in names})
    for f in dataclasses.fields(group):  # type: ignore[arg-type]
        value = getattr(made, f.name)
        if value is not None and (choices := choices_of(f)) and value not in choices:
            raise UsageError(
                f"{flag_of(f.name)} {escape(value)}: not one of {', '.join(choices)}", hint=did_you_mean(value, choices)
            )
    return made


def check_names(values: Mapping[str, Any], *groups: type) -> None:
    """Raises UsageError for a parameter that no group knows."""
    known = [f.name for g in groups for f in dataclasses.fields(g)]
    for name in values:
        if name not in known:
            raise UsageError(f"unknown parameter {escape(name)!r}", hint=did_you_mean(name, known))


def flag_of(name: str) -> str:
    """The flag of a parameter: top_k -> --top-k."""
    return "--" + name.replace("_", "-")


def parameters_of(*groups: Any) -> dict[str, Any]:
    """The values of option groups by name: what a plan's id depends on, and keywords of the library's functions."""
    return {f.name: getattr(g, f.name) for g in groups for f in dataclasses.fields(g)}
