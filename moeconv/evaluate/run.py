"""evaluate: loss on text, alone or against a reference, a layer at a time; with gates for CI."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeconv.calibrate.routing import LoadCounter
from moeconv.data.tokenizer import same_tokenizer
from moeconv.data.windows import TokenData, load_tokens, sequence_length
from moeconv.errors import InputError, UsageError
from moeconv.evaluate.gates import check_limits, finite, judge
from moeconv.evaluate.score import Score, score_window
from moeconv.families.model import Model, open_model
from moeconv.options import EVALUATE_SEQ_LEN, parse_size
from moeconv.plan.meter import Meter, SilentMeter
from moeconv.stream.finite import NotFiniteError, not_finite
from moeconv.stream.layers import LayerStream, pick_device, start_meter, stream_within

_DTYPES = ("float32", "bfloat16", "float16")


def evaluate(
    model_path: str | os.PathLike[str],
    *,
    data: Sequence[str],
    reference: str | os.PathLike[str] | None = None,
    max_loss_increase: float | None = None,
    max_kl: float | None = None,
    min_agreement: float | None = None,
    tokens: int | None = None,
    seq_len: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    dtype: str | None = None,
    seed: int = 0,
    text_field: str = "text",
    max_memory: str | int | None = None,
    meter: Meter | None = None,
) -> dict[str, Any]:
    """The JSON object of `moeconv evaluate`.

    All of `data` is used, or a sample of `tokens`, in sequences of `seq_len` (256, at most the models'), as the result
    says too. `tokens` in the result are the predicted ones, a sequence's first is not; losses are nats per predicted
    token; `kl` is the mean KL(reference || model). A figure that is NaN or infinite is None and fails its gate;
    `not_finite` {message, hint} then names the first layer and tensor that make it (else None), and `passed` is False.
    The caller turns `passed` == False into exit 5. `dtype` None is float32 on the CPU, else the checkpoint's own.

    Raises UsageError for a gate without a reference, InputError for unusable data or tokenizers that differ.
    """
    meter = meter or SilentMeter()
    limits = {"max_loss_increase": max_loss_increase, "max_kl": max_kl, "min_agreement": min_agreement}
    check_limits(limits, has_reference=reference is not None)
    options: dict[str, Any] = {
        "dtype": _dtype(dtype),
        "device": pick_device(device),
        "batch_size": batch_size,
        "budget": None if max_memory is None else parse_size(max_memory, flag="--max-memory"),
        "meter": meter,
    }
    models = [open_model(path) for path in (model_path, reference) if path is not None]
    if len(models) == 2 and not same_tokenizer(models[0].checkpoint.path, models[1].checkpoint.path):
        raise InputError(
            "the model and its reference have different tokenizers: their losses cannot be compared",
            hint="Compare with a model that has the same tokenizer.json.",
        )
    length = min(sequence_length(model, seq_len, default=EVALUATE_SEQ_LEN) for model in models)
    meter.note("reading the data")
    read = load_tokens(data, models[0].checkpoint.path, tokens=tokens, seq_len=length, seed=seed, text_field=text_field)
    start_meter(meter, *models)
    began = time.monotonic()
    layers: list[dict[str, Any]] = []
    problem: NotFiniteError | None = None
    rate = memory = None
    options["flows"] = len(models)
    try:
        stream = _pass(models[0], read.windows, options, loads=layers)
        memory = stream.placement
        seconds = time.monotonic() - began
        other = _pass(models[1], read.windows, options, loads=[]) if len(models) == 2 else None
        meter.note("computing the losses")
        scores, tail_seconds = _score(stream, other, read.source, len(read.sources))
        rate = read.tokens / (seconds + tail_seconds)
        problem = _tail_problem(models, scores, dtype=stream.dtype)
    except NotFiniteError as error:
        scores, problem = _unknown(read), error
    result = _result(scores, [s.name for s in read.sources], compared=len(models) == 2)
    gates = judge(limits, result.pop("figures"))
    return result | {
        "seq_len": read.seq_len,
        "memory": memory and memory.to_json(),
        "tokens_per_second": rate,
        "layers": layers,
        "passed": problem is None and all(gate["passed"] for gate in gates.values()),
        "gates": gates,
        "not_finite": None if problem is None else {"message": problem.message, "hint": problem.hint},
    }


def _unknown(read: TokenData) -> list[Score]:
    """Scores of data on which a layer computes NaN: the tokens alone are known."""
    counts = np.bincount(read.source, minlength=len(read.sources)) * (read.seq_len - 1)
    return [Score(int(n), math.nan, math.nan, math.nan) for n in counts]


def _tail_problem(models: Sequence[Model], scores: Sequence[Score], *, dtype: torch.dtype) -> NotFiniteError | None:
    """What made a loss NaN or infinite although every layer was finite: the final norm or the output head."""
    for model, field in zip(models, ("loss", "reference_loss")):
        if not all(math.isfinite(getattr(score, field)) for score in scores):
            return not_finite(model, None, dtype=dtype)
    return None


def _dtype(word: str | None) -> torch.dtype | None:
    if word is not None and word not in _DTYPES:
        raise UsageError(f"--dtype {word}: not one of {', '.join(_DTYPES)}")
    return None if word is None else getattr(torch, word)


def _pass(model: Model, windows: Any, options: dict[str, Any], *, loads: list[dict[str, Any]]) -> LayerStream:
    """The model passed up to its final hidden states; the routing load of its MoE layers goes to `loads`."""
    # transformers' own default for experts, so that this measures what a user runs
    stream = stream_within(model, windows, experts="grouped_mm", what="evaluate", judged=True, **options)
    for layer in stream.layers():
        if layer.experts is None:
            continue
        counter = LoadCounter(layer.index, model.num_experts)
        for batch in layer.batches():
            assert batch.router_logits is not None and batch.top_k_index is not None
            counter.add(router_logits=batch.router_logits, top_k_index=batch.top_k_index)
        loads.append(counter.result())
    return stream


def _score(stream: LayerStream, other: LayerStream | None, source: Any, sources: int) -> tuple[list[Score], float]:
    """A Score per data source, window by window through both tails; and the seconds that the model's own took."""
    scores = [Score() for _ in range(sources)]
    seconds = 0.0
    theirs: Iterator[tuple[slice, Tensor]] = other.logits() if other else iter(())
    mine = stream.logits()
    while True:
        began = time.monotonic()
        item = next(mine, None)
        seconds += time.monotonic() - began
        if item is None:
            break
        rows, logits = item
        reference = next(theirs)[1][0] if other else None
        if reference is not None and reference.shape != logits[0].shape:
            raise InputError(
                f"the model predicts {logits.shape[-1]} tokens, its reference {reference.shape[-1]}",
                hint="Compare with a model of the same vocabulary.",
            )
        scores[int(source[rows.start])].add(score_window(stream.windows[rows.start], logits[0], reference))
    return scores, seconds


def _result(scores: list[Score], names: list[str], *, compared: bool) -> dict[str, Any]:
    total = Score()
    for score in scores:
        total.add(score)
    loss, theirs = total.mean("loss"), total.mean("reference_loss")
    # a most likely token of NaN logits says nothing, so that its agreement is no number either
    agreement = total.mean("agree") if math.isfinite(loss) and math.isfinite(theirs) else math.nan
    figures = {"loss_increase": loss - theirs, "kl": total.mean("kl"), "top1_agreement": agreement}
    sources = []
    for name, score in zip(names, scores):
        row = {"name": name, "tokens": score.tokens, "loss": finite(score.mean("loss"))}
        if compared:
            row |= {"reference_loss": finite(score.mean("reference_loss")), "kl": finite(score.mean("kl"))}
        sources.append(row)
    return {
        "tokens": total.tokens,
        "loss": finite(loss),
        "perplexity": _perplexity(loss),
        "sources": sources,
        "reference": {"loss": finite(theirs), "perplexity": _perplexity(theirs)} if compared else None,
        "kl": finite(figures["kl"]) if compared else None,
        "top1_agreement": finite(figures["top1_agreement"]) if compared else None,
        "figures": figures,
    }


def _perplexity(loss: float) -> float | None:
    return math.exp(loss) if loss < 700 else None
