"""`evaluate`: the loss on text, alone or against a reference, computed layer by layer; with gates for CI."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moeconv.calibrate.routing import LoadCounter
from moeconv.contract import Evaluated, Load, SourceLoss
from moeconv.data.tokenizer import same_tokenizer
from moeconv.data.windows import TokenData, load_tokens, sequence_length
from moeconv.errors import InputError, UsageError
from moeconv.evaluate.gates import check_limits, finite, judge
from moeconv.evaluate.score import Score, score_window
from moeconv.families.model import Model, open_model
from moeconv.options import EVALUATE_SEQ_LEN, parse_size
from moeconv.plan.meter import Meter, SilentMeter
from moeconv.plan.phases import phase
from moeconv.stream.finite import NotFiniteError, not_finite
from moeconv.stream.layers import LayerStream, pick_device, start_meter, stream_within

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class _Settings:
    """How the models are run. `flows` is the number of models whose activations are held at the same time."""

    dtype: torch.dtype | None
    device: torch.device
    batch_size: int
    budget: int | None
    flows: int
    meter: Meter


@phase("evaluate")
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
) -> Evaluated:
    """Measure the loss of a model on text, and return the JSON object of `moeconv evaluate`.

    All of `data` is used, or a sample of `tokens` tokens, in sequences of `seq_len` tokens (by default 256, or the
    models' maximum where that is less). The result's `tokens` counts the predicted tokens, which are all but the first
    of each sequence. Losses are in nats per predicted token; `kl` is the mean of KL(reference || model).

    A figure that is NaN or infinite is None and fails its gate. `not_finite` {message, hint} then names the first layer
    and tensor that produce such values, and `passed` is False. The caller turns `passed` == False into exit code 5.
    With `dtype` None, the models run in float32 on the CPU, and elsewhere in the checkpoint's own dtype.

    Raises UsageError for a gate without a reference, and InputError for data that cannot be used and for models with
    different tokenizers.
    """
    meter = meter or SilentMeter()
    limits = {"max_loss_increase": max_loss_increase, "max_kl": max_kl, "min_agreement": min_agreement}
    check_limits(limits, has_reference=reference is not None)
    settings = _Settings(
        _dtype(dtype), pick_device(device), batch_size,
        budget=None if max_memory is None else parse_size(max_memory, flag="--max-memory"),
        flows=1 if reference is None else 2, meter=meter,
    )  # fmt: skip
    models = [open_model(path) for path in (model_path, reference) if path is not None]
    _check_tokenizers(models)
    length = min(sequence_length(model, seq_len, default=EVALUATE_SEQ_LEN) for model in models)
    meter.note("reading the data")
    read = load_tokens(data, models[0].checkpoint.path, tokens=tokens, seq_len=length, seed=seed, text_field=text_field)
    start_meter(meter, *models, tokens=read.windows.size)
    began = time.monotonic()
    layers: list[Load] = []
    problem: NotFiniteError | None = None
    rate = memory = None
    try:
        stream = _pass(models[0], read.windows, settings, loads=layers)
        memory = stream.placement
        seconds = time.monotonic() - began
        other = _pass(models[1], read.windows, settings, loads=[]) if len(models) == 2 else None
        meter.note("computing the losses")
        scores, tail_seconds = _score(stream, other, read.source, len(read.sources), meter=meter)
        rate = read.tokens / (seconds + tail_seconds)
        problem = _tail_problem(models, scores, dtype=stream.dtype)
    except NotFiniteError as error:
        scores, problem = _unknown(read), error
    total = Score()
    for score in scores:
        total.add(score)
    compared, figures = len(models) == 2, _figures(total)
    gates = judge(limits, figures)
    loss, reference_loss = total.mean("loss"), total.mean("reference_loss")
    return {
        "path": str(models[0].checkpoint.path),
        "tokens": total.tokens,
        "loss": finite(loss),
        "perplexity": _perplexity(loss),
        "sources": [_source(s.name, score, compared=compared) for s, score in zip(read.sources, scores)],
        "reference": {"loss": finite(reference_loss), "perplexity": _perplexity(reference_loss)} if compared else None,
        "kl": finite(figures["kl"]) if compared else None,
        "top1_agreement": finite(figures["top1_agreement"]) if compared else None,
        "seq_len": read.seq_len,
        "memory": None if memory is None else memory.to_json(),
        "tokens_per_second": rate,
        "layers": layers,
        "passed": problem is None and all(gate["passed"] for gate in gates.values()),
        "gates": gates,
        "not_finite": None if problem is None else {"message": problem.message, "hint": problem.hint},
    }


def _check_tokenizers(models: Sequence[Model]) -> None:
    if len(models) == 2 and not same_tokenizer(models[0].checkpoint.path, models[1].checkpoint.path):
        raise InputError(
            "the model and its reference have different tokenizers, so their losses cannot be compared",
            hint="Pass a --reference that has the same tokenizer.json.",
        )


def _unknown(read: TokenData) -> list[Score]:
    """The scores of data on which a layer computes NaN: only the numbers of tokens are known."""
    counts = np.bincount(read.source, minlength=len(read.sources)) * (read.seq_len - 1)
    return [Score(int(n), math.nan, math.nan, math.nan) for n in counts]


def _tail_problem(models: Sequence[Model], scores: Sequence[Score], *, dtype: torch.dtype) -> NotFiniteError | None:
    """The cause of a loss that is NaN or infinite although the outputs of every layer were finite: the final norm or
    the output head. None where all losses are finite."""
    for model, field in zip(models, ("loss", "reference_loss")):
        if not all(math.isfinite(getattr(score, field)) for score in scores):
            return not_finite(model, None, dtype=dtype)
    return None


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in _DTYPES:
        raise UsageError(f"--dtype {name}: not one of {', '.join(_DTYPES)}")
    return None if name is None else _DTYPES[name]


def _pass(model: Model, windows: np.ndarray, settings: _Settings, *, loads: list[Load]) -> LayerStream:
    """Run all layers of the model, up to its final hidden states. The routing load of each MoE layer is appended to
    `loads`."""
    # the default implementation of the experts, where it can run: the loss is that of the code that users run
    stream = stream_within(
        model, windows, what="evaluate", judged=True, flows=settings.flows, dtype=settings.dtype,
        device=settings.device, batch_size=settings.batch_size, budget=settings.budget, meter=settings.meter,
    )  # fmt: skip
    for layer in stream.layers():
        if layer.experts is None:
            continue
        counter = LoadCounter(layer.index, model.num_experts)
        for batch in layer.batches():
            assert batch.router_logits is not None and batch.top_k_index is not None
            counter.add(router_logits=batch.router_logits, top_k_index=batch.top_k_index)
        loads.append(counter.result())
    return stream


def _score(
    stream: LayerStream, other: LayerStream | None, source: np.ndarray, sources: int, *, meter: Meter
) -> tuple[list[Score], float]:
    """(one Score per data source, the seconds that the model's own output head took). `source` int64 [n] is the data
    source of each window. The logits of the model and of its reference are made window by window."""
    scores = [Score() for _ in range(sources)]
    seconds = 0.0
    theirs: Iterator[tuple[slice, Tensor]] = other.logits() if other else iter(())
    mine = stream.logits()
    count, length = stream.windows.shape
    meter.start(total_bytes=count, parts=count, unit="sequence", tokens=count * length)
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
                f"the model has a vocabulary of {logits.shape[-1]} tokens, and its reference one of "
                f"{reference.shape[-1]}",
                hint="Pass a --reference with the same vocabulary.",
            )
        scores[int(source[rows.start])].add(score_window(stream.windows[rows.start], logits[0], reference))
        meter.advance(1)
        meter.part_done()
    return scores, seconds


def _figures(total: Score) -> dict[str, float]:
    """The figures that the gates limit."""
    loss, reference_loss = total.mean("loss"), total.mean("reference_loss")
    # The most likely token of NaN logits has no meaning, so that the agreement is NaN as well.
    agreement = total.mean("agree") if math.isfinite(loss) and math.isfinite(reference_loss) else math.nan
    return {"loss_increase": loss - reference_loss, "kl": total.mean("kl"), "top1_agreement": agreement}


def _source(name: str, score: Score, *, compared: bool) -> SourceLoss:
    row: SourceLoss = {"name": name, "tokens": score.tokens, "loss": finite(score.mean("loss"))}
    if compared:
        row["reference_loss"] = finite(score.mean("reference_loss"))
        row["kl"] = finite(score.mean("kl"))
    return row


def _perplexity(loss: float) -> float | None:
    """exp(loss); None where a float cannot hold it, and for NaN."""
    return math.exp(loss) if loss < 700 else None
