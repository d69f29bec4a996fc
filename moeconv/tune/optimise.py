"""The training loop of all objectives: AdamW with a schedule, and the best of a few evaluations on held-out data.

Before an evaluation, the values are rounded to the dtype on disk, so that it measures what will be written. Of several
processes, each computes the gradient of its share of a batch, and all apply the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from moeconv.errors import MoeconvError
from moeconv.options import LOOKS
from moeconv.stream.skeleton import Stock
from moeconv.tune.parameters import (
    Piece,
    exact,
    own,
    parameters_by_word,
    restore,
    round_in_place,
    sharded,
    snapshot,
)
from moeconv.world import all_agree, current, summed

M = TypeVar("M")

_FLOOR = 0.1  # share of the peak at which cosine and linear end
_CLIP = 1.0
_BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Schedule:
    """The number of steps and the learning rates. `decay`: cosine, linear or constant. `warmup`: a share of the steps.
    `look_every`: the steps between evaluations. `patience`: training stops after this number of evaluations without
    improvement."""

    steps: int
    rates: Mapping[str, float]  # peak, by word of --train
    decay: str = "cosine"
    warmup: float = 0.1
    look_every: int | None = None
    patience: int | None = None

    def rate_at(self, step: int) -> float:
        """The share of the peak learning rate at `step`, counted from 0: linear warmup, then the decay."""
        warm = max(1, round(self.steps * self.warmup)) if self.warmup else 0
        if step < warm:
            return (step + 1) / warm
        done = (step - warm) / max(1, self.steps - warm)
        left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[self.decay]
        return _FLOOR + (1 - _FLOOR) * left

    def evaluations(self) -> set[int]:
        """The steps after which the held-out data is evaluated; the last step is one of them."""
        if self.look_every is None:
            return {round(self.steps * (i + 1) / LOOKS) for i in range(LOOKS)} - {0}
        return {*range(self.look_every, self.steps, self.look_every), self.steps}


@dataclass(frozen=True)
class Outcome(Generic[M]):
    """The measurements on held-out data before and after. `improved`: the best values are better than the first ones.
    `diverged_at`: the step at which a loss or gradient was not finite, which ends training. `stopped_at`: the step at
    which training stopped because of `patience`."""

    before: M
    after: M
    improved: bool = False
    diverged_at: int | None = None
    stopped_at: int | None = None


def optimise(
    pieces: Sequence[Piece],
    *,
    schedule: Schedule,
    step: Callable[[int], float],
    measure: Callable[[], M],
    score: Callable[[M], float],
    note: Callable[[int, float, M | None], None],
    not_finite: Callable[[], MoeconvError],
) -> Outcome[M]:
    """Train the parameters of the pieces, and leave the best values in them (the first ones if none was better).

    `step(i)` computes the gradients and returns the loss; training ends if that is not finite. `measure()` evaluates
    the held-out data, and `score` turns the result into a number, lower is better. `note` is called after every step
    and every evaluation, with the number of steps and the last loss. Raises `not_finite()` if the first score is NaN or
    infinite.
    """
    groups = parameters_by_word(pieces)
    parameters = [p for found in groups.values() for p in found]
    leaves = {
        id(p): nn.Parameter(own(p), requires_grad=False) for p in parameters
    }  # for a sharded parameter, its local shard
    before = measure()
    if not math.isfinite(score(before)):
        raise not_finite()
    best_values, since_best = snapshot(pieces), 0  # evaluations since the best one
    best: Outcome[M] = Outcome(before, before)
    optimiser = torch.optim.AdamW(
        [
            {"params": [leaves[id(p)] for p in found], "lr": schedule.rates[word], "peak": schedule.rates[word]}
            for word, found in groups.items()
        ],
        betas=_BETAS, weight_decay=0.0, fused=True,
    )  # fmt: skip
    for p in parameters:
        p.requires_grad_(True)
    try:
        for i in range(schedule.steps):
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * schedule.rate_at(i)
            for p in parameters:
                p.grad = None
            loss = step(i)
            if not all_agree(math.isfinite(loss)) or not bool(_gather_gradients(parameters, leaves).isfinite()):
                best = replace(best, diverged_at=i)
                break
            optimiser.step()
            note(i + 1, loss, None)
            if i + 1 not in schedule.evaluations():
                continue
            measured, rounded = _evaluate(pieces, measure)
            note(i + 1, loss, measured)
            if score(measured) < score(best.after):
                best, best_values, since_best = replace(best, after=measured, improved=True), rounded, 0
                continue
            since_best += 1
            if schedule.patience is not None and since_best >= schedule.patience and i + 1 < schedule.steps:
                best = replace(best, stopped_at=i + 1)
                break
    finally:
        for p in parameters:
            p.requires_grad_(False)
            p.grad = None
    restore(pieces, best_values)
    return best


def _gather_gradients(parameters: Sequence[Tensor], leaves: Mapping[int, nn.Parameter]) -> Tensor:
    """Give each leaf its gradient, summed over the processes and clipped. Returns the norm before clipping, a
    scalar."""
    size = current().size
    parts: list[Tensor] = []  # shards: their norm needs the sum over all processes
    wholes: list[Tensor] = []
    for p in parameters:
        leaf, grad = leaves[id(p)], p.grad
        if sharded(p):
            local: Stock = grad
            leaf.grad = None if grad is None else local.to_local() * size  # FSDP2 takes the mean over the processes
            parts += [] if leaf.grad is None else [leaf.grad]
        else:
            leaf.grad = grad if size == 1 else summed(torch.zeros_like(leaf) if grad is None else grad)
            wholes += [] if leaf.grad is None else [leaf.grad]
    square = get_total_norm(wholes).square() if wholes else torch.zeros(())
    if any(sharded(p) for p in parameters):
        square = square + summed(get_total_norm(parts).square() if parts else torch.zeros((), device=square.device))
    norm = square.sqrt()
    clip_grads_with_norm_(leaves.values(), _CLIP, norm)
    return norm


def _evaluate(pieces: Sequence[Piece], measure: Callable[[], M]) -> tuple[M, list[Tensor]]:
    """(the measurement of the values rounded as they would be written, these rounded values). Training continues with
    the unrounded values."""
    unrounded = exact(pieces)
    round_in_place(pieces)
    measured, rounded = measure(), snapshot(pieces)
    restore(pieces, unrounded)
    return measured, rounded
