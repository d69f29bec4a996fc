"""The training loop that every objective shares: AdamW, warmup and cosine, the best of a few looks at held-out data.

What is measured is what will be written: values are rounded to the dtype on disk first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from moeconv.tune.parameters import Piece, parameters_by_word, restore, snapshot

M = TypeVar("M")

_LOOKS = 4  # how often the held-out data is measured on the way
_WARMUP = 0.1
_FLOOR = 0.1  # of the peak, where the cosine ends
_CLIP = 1.0
_BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Outcome(Generic[M]):
    """Measures of the held-out data before and after; `values` are the best pieces, None when nothing was better.

    `diverged_at` is the step at which a loss or gradient was not finite, which ends training.
    """

    before: M
    after: M
    values: Mapping[str, Tensor] | None = None
    diverged_at: int | None = None


def rate_at(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step from 0: linear warmup, then a cosine down to a tenth."""
    warm = max(1, round(steps * _WARMUP))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return _FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * done))


def looks(steps: int) -> set[int]:
    """Steps after which the held-out data is measured; the last is one of them."""
    return {round(steps * (i + 1) / _LOOKS) for i in range(_LOOKS)} - {0}


def optimise(
    pieces: Sequence[Piece],
    *,
    steps: int,
    rates: Mapping[str, float],
    step: Callable[[int], bool],
    measure: Callable[[], M],
    score: Callable[[M], float],
    note: Callable[[int, M | None], None],
) -> Outcome[M]:
    """Train the pieces' parameters and leave the best values in them (the first ones when none was better).

    `step(i)` leaves gradients and says whether they are finite: training ends where they are not. `score` is what the
    held-out data is judged by, lower is better. `rates`: peak learning rate by word of --train. `note` hears of every
    step, and of every measure.
    """
    groups = parameters_by_word(pieces)
    parameters = [p for found in groups.values() for p in found]
    before = measure()
    first = snapshot(pieces)
    best: Outcome[M] = Outcome(before, before)
    optimiser = torch.optim.AdamW(
        [{"params": found, "lr": rates[word], "peak": rates[word]} for word, found in groups.items()],
        betas=_BETAS, weight_decay=0.0, fused=True,
    )  # fmt: skip
    for p in parameters:
        p.requires_grad_(True)
    try:
        for i in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * rate_at(i, steps)
            optimiser.zero_grad(set_to_none=True)
            if not step(i) or not bool(clip_grad_norm_(parameters, _CLIP).isfinite()):
                best = replace(best, diverged_at=i)
                break
            optimiser.step()
            note(i + 1, None)
            if i + 1 in looks(steps):
                best = _look(pieces, best, i + 1, measure, score, note)
    finally:
        for p in parameters:
            p.requires_grad_(False)
            p.grad = None
    restore(pieces, best.values or first)
    return best


def _look(
    pieces: Sequence[Piece], best: Outcome[M], done: int, measure: Callable[[], M], score: Callable[[M], float],
    note: Callable[[int, M | None], None],
) -> Outcome[M]:  # fmt: skip
    """Measure the values as they would be written, and go on with the unrounded ones."""
    exact = {p.name: p.value().clone() for p in pieces}
    rounded = snapshot(pieces)
    restore(pieces, rounded)
    measured = measure()
    restore(pieces, exact)
    note(done, measured)
    return replace(best, after=measured, values=rounded) if score(measured) < score(best.after) else best
