"""The router entries of new experts, measured on the model that gets them.

The row w of a new expert is the solution of a ridge regression on the inputs x of the router. For tokens of its own
text the target is the logit of the token's best expert, so that the new one competes with it; for all other text it is
as far below the logit that the token's top-k needs as the best is above that, in the mean over all tokens:

    min over w of   mean over own text (w x - best(x))^2
                  + mean over other text (w x - (needed(x) - gap))^2 + 1e-3 tr(G) / H |w|^2

where G is the mean of x x^T of both, each with the same weight. Where a correction bias is added for the choice, the
new expert has the mean of the old biases, and `needed` counts that in. Scales have the mean of the old ones too. Logit
biases are 0 and part of no target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moeconv.checkpoint.artifact import artifact_metadata
from moeconv.checkpoint.writer import writing_artifact
from moeconv.contract import AddedLayer
from moeconv.data.windows import TokenData, load_tokens, sequence_length, split_windows
from moeconv.errors import InputError, UsageError
from moeconv.families.model import Model
from moeconv.families.rule import Rule, has_numbers, rule_of
from moeconv.options import SEQ_LEN, TOKENS, DataOptions, MeasureOptions, device_limit, parse_size
from moeconv.plan.kernels.arrays import raw_bytes, to_float32
from moeconv.plan.meter import Meter
from moeconv.plan.phases import phase
from moeconv.stream.device import pick_device
from moeconv.stream.layer import Layer
from moeconv.stream.layers import start_meter, stream_within
from moeconv.units import counted
from moeconv.upcycle.added import router_entries

_RIDGE = 1e-3
_HELD_OUT_EVERY = 4
_AGREE = 1e-2  # of the spread of the logits: how well rows times inputs must give them


@phase("router")
def measure_rows(
    model: Model, path: Path, *, count: int, data: DataOptions, measure: MeasureOptions, seed: int, meter: Meter
) -> list[AddedLayer]:
    """Write the entries of `count` new experts to the overlay `path`. The i-th --data value is the text of the i-th
    expert, and further values are text on which none should be chosen. One of every four windows is held out.

    Returns for each layer the share of the held-out tokens of each value that choose each new expert, [values][count].
    Raises UsageError for too few values, InputError where the inputs of the routers cannot be read.
    """
    check_data(model, count, data.data)
    read = load_tokens(
        data.data, model.checkpoint.path, tokens=measure.tokens or TOKENS,
        seq_len=sequence_length(model, measure.seq_len, default=SEQ_LEN), seed=seed, text_field=measure.text_field,
    )  # fmt: skip
    fit, rest = split_windows(read, every=_HELD_OUT_EVERY)
    both = TokenData(
        np.concatenate([fit.windows, rest.windows]), np.concatenate([fit.source, rest.source]), fit.sources
    )  # fmt: skip
    fits = np.arange(len(both.windows)) < len(fit.windows)
    for i in range(count):
        if not (fits & (both.source == i)).any():
            raise InputError(
                f"no tokens of {read.sources[i].name} are used, so that its expert would have no router row",
                hint="Raise --tokens, lower --seq-len, or give more text.",
            )
    start_meter(meter, model, tokens=both.windows.size)
    stream = stream_within(
        model, both.windows, device=pick_device(measure.device, device_limit(measure.max_device_memory)),
        batch_size=measure.batch_size,
        budget=None if measure.max_memory is None else parse_size(measure.max_memory, flag="--max-memory"),
        meter=meter, what="finding routers",
    )  # fmt: skip
    entries = router_entries(model, count)
    specs = [(name, "F32", shape) for of in entries.values() for _, name, shape in of.values()]
    metadata = artifact_metadata(
        "overlay", identity=model.identity, router="added", seed=seed, data=[s.to_json() for s in read.sources],
        tokens=read.tokens, seq_len=read.seq_len,
    )  # fmt: skip
    figures: list[AddedLayer] = []
    with writing_artifact(path, specs, metadata=metadata, overwrite=False) as writer:
        for layer in stream.layers():
            if layer.index not in entries:
                continue
            old = {key: _values(model, name) for key, (name, _, _) in entries[layer.index].items()}
            sums = _read(model, layer, both, fits, old)
            rows = np.stack([_row(sums, own=i) for i in range(count)])
            for key, (_, name, shape) in entries[layer.index].items():
                made = rows if key == "router.weight" else np.full(shape, _usual(key, old[key]))
                writer.write(name, raw_bytes(made.astype(np.float32).reshape(shape)))
            figures.append({"layer": layer.index, "picked": _picked(sums, rows)})
    return figures


def check_data(model: Model, count: int, data: Sequence[str]) -> None:
    """Raises UsageError where --data has no text for some expert, InputError for a routing rule that is not known."""
    if len(data) < count:
        raise UsageError(
            f"--add-experts-from needs the text of each new expert: {counted(count, 'expert')}, and "
            f"{counted(len(data), 'value')} of --data",
            hint="Give one --data per expert, in their order, and more of them with other text.",
        )
    if not has_numbers(model):
        raise InputError(f"the routing rule of {model.family.model_type} is not known in numbers")


@dataclass(eq=False)
class _RowSums:
    """What the rows of a layer are computed from, by source of data: over the tokens to fit on, their number [S], the
    sums of x x^T [S, H, H], of x [S, H], of x times the logit needed and times the best one, and of best - needed; and
    the held-out inputs and needed logits of each source."""

    tokens: np.ndarray
    gram: np.ndarray
    inputs: np.ndarray
    needed: np.ndarray
    best: np.ndarray
    gap: float = 0.0
    held: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    @staticmethod
    def empty(sources: int, width: int) -> _RowSums:
        each = (sources, width)
        return _RowSums(np.zeros(sources), np.zeros((*each, width)), np.zeros(each), np.zeros(each), np.zeros(each))


def _read(model: Model, layer: Layer, read: TokenData, fits: np.ndarray, old: dict[str, np.ndarray]) -> _RowSums:
    sums = _RowSums.empty(len(read.sources), model.hidden_size)
    held: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in read.sources]
    for batch in layer.batches():
        assert batch.router_logits is not None
        inputs, logits = (x.double().cpu().numpy() for x in (batch.ffn_input, batch.router_logits))
        _check_reads(model, layer.index, inputs, logits, old)
        needed, best = _needed(rule_of(model), logits, old)
        source, is_fit = (np.repeat(values[batch.rows], read.seq_len) for values in (read.source, fits))
        for i in range(len(read.sources)):
            at = is_fit & (source == i)
            x = inputs[at]
            sums.tokens[i] += len(x)
            sums.gram[i] += x.T @ x
            sums.inputs[i] += x.sum(0)
            sums.needed[i] += x.T @ needed[at]
            sums.best[i] += x.T @ best[at]
            sums.gap += float((best - needed)[at].sum())
            at = ~is_fit & (source == i)
            held[i].append((inputs[at].astype(np.float32), needed[at]))
    sums.held = [(np.concatenate([x for x, _ in of]), np.concatenate([y for _, y in of])) for of in held]
    return sums


def _values(model: Model, name: str) -> np.ndarray:
    """A tensor with one entry per expert, float64 [E, ...]."""
    ref = model.checkpoint.tensors[name]
    values = to_float32(model.checkpoint.read(name), ref.dtype, ref.shape)
    return values.astype(np.float64).reshape(model.num_experts, -1)


def _check_reads(model: Model, layer: int, inputs: np.ndarray, logits: np.ndarray, old: dict[str, np.ndarray]) -> None:
    """Raises InputError where the logits are not the rows times what the FFN reads."""
    made = inputs @ old["router.weight"].T + old.get("router.bias", np.zeros((1, 1))).T
    gap, spread = float(np.sqrt(np.mean((made - logits) ** 2))), float(logits.std())
    if not gap <= _AGREE * max(spread, 1e-12):
        raise InputError(
            f"layer {layer}: the router of {model.family.model_type} does not read what its FFN reads, so that no row "
            "can be fitted",
            hint="Use `moeconv upcycle --keep-top-k` for more experts in this family.",
        )


def _needed(rule: Rule, logits: np.ndarray, old: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(the logit above which a new expert is among the top-k, the logit of the best expert) of each token, [T]."""
    bias = sum((v.reshape(-1) for k, v in old.items() if k.startswith("router.correction")), np.zeros(logits.shape[1]))
    own = float(np.mean(bias))
    largest = logits.max(1, keepdims=True)
    whole = largest[:, 0] + np.log(np.exp(logits - largest).sum(1))
    if not np.any(bias):
        choice = logits
    elif rule.score == "sigmoid":
        choice = 1 / (1 + np.exp(-logits)) + bias - own
    else:
        choice = np.exp(logits - whole[:, None]) + bias - own
    needed, best = np.sort(choice, 1)[:, -rule.top_k], choice.max(1)
    if not np.any(bias):
        return needed, best
    if rule.score == "sigmoid":
        needed, best = (np.clip(x, 1e-3, 1 - 1e-3) for x in (needed, best))
        return np.log(needed / (1 - needed)), np.log(best / (1 - best))
    return tuple(np.log(np.clip(x, 1e-6, 1.0)) + whole for x in (needed, best))


def _row(sums: _RowSums, *, own: int) -> np.ndarray:
    """The row [H] of the new expert whose text is the source `own`."""
    other = np.arange(len(sums.tokens)) != own
    gap = sums.gap / sums.tokens.sum()
    gram, right = sums.gram[own] / sums.tokens[own], sums.best[own] / sums.tokens[own]
    if (count := sums.tokens[other].sum()) > 0:
        gram = gram + sums.gram[other].sum(0) / count
        right = right + (sums.needed[other].sum(0) - gap * sums.inputs[other].sum(0)) / count
    width = len(right)
    ridge = _RIDGE * max(float(np.trace(gram)) / width, 1e-30)
    row: np.ndarray = np.linalg.solve(gram + ridge * np.eye(width), right)
    return row


def _picked(sums: _RowSums, rows: np.ndarray) -> list[list[float] | None]:
    """The share of the held-out tokens of each source that choose each new expert."""
    return [
        [round(float(share), 4) for share in (x @ rows.T > needed[:, None]).mean(0)] if len(x) else None
        for x, needed in sums.held
    ]


def _usual(key: str, old: np.ndarray) -> float:
    """The entry of a new expert in a tensor other than the rows."""
    return 0.0 if key == "router.bias" else float(old.mean())
