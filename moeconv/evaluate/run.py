"""`evaluate`: the loss on text and the accuracy on tasks, alone or against a reference, layer by layer; with gates."""

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
from moeconv.evaluate.gates import check_limits, check_sources, finite, judge
from moeconv.evaluate.score import Score, score_window
from moeconv.evaluate.settings import PassSettings
from moeconv.evaluate.tasks import accuracy_figures, answer_tasks, longest_of, read_questions
from moeconv.families.model import Model, open_model
from moeconv.options import EVALUATE_SEQ_LEN, device_limit, parse_size
from moeconv.plan.meter import Meter, SilentMeter
from moeconv.plan.phases import phase
from moeconv.stream.device import pick_device
from moeconv.stream.finite import NotFiniteError, not_finite
from moeconv.stream.layers import LayerStream, start_meter

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@phase("evaluate")
def evaluate(
    model_path: str | os.PathLike[str],
    *,
    data: Sequence[str] = (),
    tasks: Sequence[str] = (),
    questions: int | None = None,
    reference: str | os.PathLike[str] | None = None,
    max_loss_increase: float | None = None,
    max_kl: float | None = None,
    min_agreement: float | None = None,
    min_accuracy: float | None = None,
    max_accuracy_drop: float | None = None,
    tokens: int | None = None,
    seq_len: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    dtype: str | None = None,
    seed: int = 0,
    text_field: str = "text",
    max_memory: str | int | None = None,
    max_device_memory: str | int | None = None,
    meter: Meter | None = None,
) -> Evaluated:
    """Measure the loss of a model on text, its accuracy on tasks, or both, and return the JSON object of `moeconv
    evaluate`.

    All of `data` is used, or a sample of `tokens` tokens, in sequences of `seq_len` tokens (by default 256, or the
    models' maximum where that is less). The result's `tokens` counts the predicted tokens, which are all but the first
    of each sequence. Losses are in nats per predicted token; `kl` is the mean of KL(reference || model). `tasks` are
    request files (`data.tasks`), of which the first `questions` are answered; an input of more than `seq_len` tokens
    (by default the models' maximum) is truncated at its beginning.

    A figure that is NaN or infinite is None and fails its gate. `not_finite` {message, hint} then names the first layer
    and tensor that produce such values, and `passed` is False. The caller turns `passed` == False into exit code 5.
    With `dtype` None, the models run in float32 on the CPU, and elsewhere in the checkpoint's own dtype.

    Raises UsageError for a gate whose figure is not measured, and InputError for data that cannot be used and for
    models with different tokenizers.
    """
    meter = meter or SilentMeter()
    limits = {
        "max_loss_increase": max_loss_increase, "max_kl": max_kl, "min_agreement": min_agreement,
        "min_accuracy": min_accuracy, "max_accuracy_drop": max_accuracy_drop,
    }  # fmt: skip
    given = [name for name, values in (("data", data), ("tasks", tasks)) if values]
    check_limits(limits, has_reference=reference is not None, sources=given)
    if not given:
        raise UsageError("no data was given", hint="Pass --data with text, --tasks with questions, or both.")
    check_sources(given, questions=questions, tokens=tokens, batch_size=batch_size)
    settings = PassSettings(
        _dtype(dtype), pick_device(device, device_limit(max_device_memory)), batch_size,
        budget=None if max_memory is None else parse_size(max_memory, flag="--max-memory"), meter=meter,
    )  # fmt: skip
    models = [open_model(path) for path in (model_path, reference) if path is not None]
    _check_tokenizers(models)
    asked = read_questions(tasks, models, seq_len, questions, settings) if tasks else None
    read = _read_data(data, models, tokens, seq_len, seed, text_field, meter) if data else None
    found = _measure_loss(models, read, settings) if read is not None else _Losses([], [])
    problem, answered = found.problem, None
    if asked is not None and problem is None:
        answered, problem = answer_tasks(models, asked, settings, seed=seed)
    total = Score()
    for score in found.scores:
        total.add(score)
    compared, figures = len(models) == 2, _figures(total) | accuracy_figures(answered)
    gates = judge(limits, figures)
    loss, reference_loss = total.mean("loss"), total.mean("reference_loss")
    compares = compared and read is not None
    sources = [] if read is None else read.sources
    result: Evaluated = {
        "path": str(models[0].checkpoint.path),
        "tokens": total.tokens,
        "loss": finite(loss),
        "perplexity": _perplexity(loss),
        "sources": [_source(s.name, score, compared=compared) for s, score in zip(sources, found.scores)],
        "reference": {"loss": finite(reference_loss), "perplexity": _perplexity(reference_loss)} if compares else None,
        "kl": finite(figures["kl"]) if compared else None,
        "top1_agreement": finite(figures["top1_agreement"]) if compared else None,
        "seq_len": longest_of(asked) if read is None else read.seq_len,
        "memory": None if settings.placed is None else settings.placed.to_json(),
        "tokens_per_second": found.rate,
        "layers": found.loads,
        "passed": problem is None and all(gate["passed"] for gate in gates.values()),
        "gates": gates,
        "not_finite": None if problem is None else {"message": problem.message, "hint": problem.hint},
    }
    if tasks:
        result["tasks"] = answered
    return result


@dataclass
class _Losses:
    """What was measured on text: one Score per source, the routing load of each MoE layer, tokens per second, and what
    made a loss NaN or infinite."""

    scores: list[Score]
    loads: list[Load]
    rate: float | None = None
    problem: NotFiniteError | None = None


def _read_data(
    data: Sequence[str], models: Sequence[Model], tokens: int | None, seq_len: int | None, seed: int, text_field: str,
    meter: Meter,
) -> TokenData:  # fmt: skip
    length = min(sequence_length(model, seq_len, default=EVALUATE_SEQ_LEN) for model in models)
    meter.note("reading the data")
    return load_tokens(data, models[0].checkpoint.path, tokens=tokens, seq_len=length, seed=seed, text_field=text_field)


def _measure_loss(models: Sequence[Model], read: TokenData, settings: PassSettings) -> _Losses:
    """The losses of the model, and of its reference where there are two models, on all windows."""
    start_meter(settings.meter, *models, tokens=read.windows.size)
    began = time.monotonic()
    found = _Losses([], [])
    try:
        stream = _pass(models[0], read.windows, settings, flows=len(models), loads=found.loads)
        seconds = time.monotonic() - began
        other = _pass(models[1], read.windows, settings, flows=2, loads=[]) if len(models) == 2 else None
        settings.meter.note("computing the losses")
        found.scores, tail_seconds = _score(stream, other, read.source, len(read.sources), meter=settings.meter)
        found.rate = read.tokens / (seconds + tail_seconds)
        found.problem = _tail_problem(models, found.scores, dtype=stream.dtype)
    except NotFiniteError as error:
        found.scores, found.problem = _unknown(read), error
    return found


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


def _pass(model: Model, windows: np.ndarray, settings: PassSettings, *, flows: int, loads: list[Load]) -> LayerStream:
    """Run all layers of the model, up to its final hidden states. The routing load of each MoE layer is appended to
    `loads`."""
    stream = settings.stream(model, windows, flows=flows)
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
