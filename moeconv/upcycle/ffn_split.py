"""One FFN cut into pieces that are always on and pieces that a router chooses: the neurons of each piece, and the
router.

Neurons start in balanced clusters of co-activation. Then router and assignment are fitted in turn: the cost of a neuron
in a group is the energy that it would have added to the output for the tokens that do not choose the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moeconv.randomness import generator
from moeconv.upcycle.grouping import assign, balanced_kmeans
from moeconv.upcycle.linear_router import logistic, missing, oracle, output_norms, ridge, select

CLUSTERINGS = ("refined", "magnitude", "binary", "random")
_CLUSTER_TOKENS = 2048
_ASSIGN_TOKENS = 6144
_TRIAL_ROUNDS, _ROUNDS = 2, 8  # rounds of router and assignment: to compare shares, and in all
_HELD = 4  # one token in so many is held out
_ACTIVE = 0.25  # binary clustering: share of a token's neurons that count as active


@dataclass(frozen=True, eq=False)
class Ffn:
    """A token sample of one layer: inputs x [n, H], activations h [n, f], and the down projection [H, f], float32."""

    x: Tensor
    h: Tensor
    down: Tensor
    layer: int
    seed: int

    @property
    def width(self) -> int:
        return self.h.shape[1]

    def held_out(self) -> Tensor:
        """The held-out tokens, on which errors are measured: bool [n]."""
        return torch.arange(len(self.x), device=self.x.device) % _HELD == 0

    def draw(self, purpose: str, count: int, among: Tensor) -> Tensor:
        """At most `count` of the positions `among` int64, drawn at random and sorted."""
        take = generator((self.seed, purpose, self.layer)).choice(len(among), min(count, len(among)), replace=False)
        return among[torch.from_numpy(np.sort(take)).to(among.device)]


@dataclass(frozen=True, eq=False)
class FfnSplit:
    """`neurons` int64 [P, w]: the neurons of each piece; the first `always` pieces are always on. `router` [R, H]: the
    router's rows for the other pieces.

    `error` is the squared norm of the missing part of the output on held-out tokens, relative to that of the whole
    output. `compensated` is the same error when the mean of the missing part, `mean` [H], is added to the output. `fit`
    names the regression of the router.
    """

    neurons: Tensor
    always: int
    router: Tensor
    error: float
    compensated: float
    mean: Tensor
    fit: str


def split_ffn(ffn: Ffn, *, pieces: int, active: int, always: Sequence[int], clustering: str = "refined") -> FfnSplit:
    """The best cut into `pieces` equal pieces, of which every token gets `active`. `always` has the numbers of pieces
    that may be always on; the number with the smallest output error after a few rounds is taken. `clustering` is one of
    CLUSTERINGS."""
    tried = [_Search(ffn, pieces, active, count, clustering).run(_TRIAL_ROUNDS) for count in always]
    best = min(tried, key=lambda search: search.best[0])
    return best.run(_ROUNDS).finish()


class _Search:
    """The search with a fixed number of pieces that are always on. `best`: (error, neurons [P, w], router rows [R,
    H])."""

    def __init__(self, ffn: Ffn, pieces: int, active: int, always: int, clustering: str) -> None:
        self.ffn, self.pieces, self.active, self.always, self.clustering = ffn, pieces, active, always, clustering
        self.top_k, self.size = active - always, ffn.width // pieces
        self.chooses = 0 < self.top_k < pieces - always  # else the router's rows stay zero
        held = ffn.held_out()
        self.train, self.test = (~held).nonzero().squeeze(1), held.nonzero().squeeze(1)
        self.score = ffn.h.abs() * ffn.down.norm(dim=0)  # the norm of what a neuron adds to the output
        self.whole = (ffn.h[self.test] @ ffn.down.T).square().sum().clamp_min(1e-30)
        self.done = 0
        self.converged = False
        self.neurons = self._start()
        self.best: tuple[float, Tensor, Tensor] = (float("inf"), self.neurons, torch.empty(0))

    def run(self, rounds: int) -> _Search:
        """Continue until `rounds` rounds are done in all, or the assignment no longer changes. Only `refined`
        clusterings have more than one round."""
        while self.done < rounds and not self.converged:
            routed = self.neurons[self.always :]
            ffn = self.ffn
            target = output_norms(ffn.h[self.train], ffn.down, routed)
            rows = ridge(ffn.x[self.train], target) * self.chooses
            error = self.error(rows)
            if error < self.best[0]:
                self.best = (error, self.neurons, rows)
            self.done += 1
            if not self.chooses or self.clustering != "refined":
                self.converged = True
                break
            moved = self._move(rows)
            self.converged = torch.equal(moved, self.neurons)
            self.neurons = moved
        return self

    def error(self, rows: Tensor, neurons: Tensor | None = None) -> float:
        """The relative output error on held-out tokens."""
        return float(self._missing(rows, self.test, neurons).square().sum() / self.whole)

    def _missing(self, rows: Tensor, at: Tensor, neurons: Tensor | None = None) -> Tensor:
        routed = (self.neurons if neurons is None else neurons)[self.always :]
        chosen = select(self.ffn.x[at], rows, top_k=self.top_k)
        return missing(self.ffn.h[at], self.ffn.down, routed, chosen)

    def finish(self) -> FfnSplit:
        """The neurons of the best round, with the better of the two regressions on held-out tokens."""
        error, neurons, rows = self.best
        ffn, fit = self.ffn, "ridge"
        routed = neurons[self.always :]
        if self.chooses:
            h = ffn.h[self.train]
            wanted = oracle(h, ffn.down, routed, top_k=self.top_k)
            other = logistic(ffn.x[self.train], wanted, weight=(h @ ffn.down.T).norm(dim=1))
            found = self.error(other, neurons)
            if found < error:
                error, rows, fit = found, other, "logistic"
        mean = self._missing(rows, self.train, neurons).mean(0)
        left = self._missing(rows, self.test, neurons) - mean
        compensated = float(left.square().sum() / self.whole)
        return FfnSplit(neurons, self.always, rows, error, compensated, mean, fit if self.chooses else "none")

    def _start(self) -> Tensor:
        """The first assignment: the neurons with the most energy are always on, and the others are clustered."""
        ffn, groups = self.ffn, self.pieces - self.always
        order: Tensor = self.score[self.train].square().mean(0).sort(descending=True, stable=True).indices
        cut = self.always * self.size
        rest = order[cut:].sort().values
        key = (ffn.seed, "split", ffn.layer)
        if not groups:
            return order.view(self.pieces, self.size)
        if self.clustering == "random":
            group = np.argsort(generator(key).permutation(len(rest))) % groups
        else:
            rows = ffn.draw("split cluster", _CLUSTER_TOKENS, self.train)
            group = balanced_kmeans(self._features(rows, rest), groups, key=key)
        members = [rest[torch.from_numpy(np.flatnonzero(group == g)).to(rest.device)] for g in range(groups)]
        return torch.cat([order[:cut].sort().values, *members]).view(self.pieces, self.size)

    def _features(self, rows: Tensor, neurons: Tensor) -> np.ndarray:
        """The features that neurons are clustered by, float32 [neurons, tokens]: the direction of their magnitudes over
        tokens, or whether they are active (`binary`)."""
        if self.clustering == "binary":
            score = self.ffn.h[rows].abs()
            top = torch.topk(score, max(1, round(_ACTIVE * score.shape[1])), dim=1).indices
            return torch.zeros_like(score).scatter_(1, top, 1.0)[:, neurons].T.cpu().numpy()
        points = self.score[rows][:, neurons].T
        return torch.nn.functional.normalize(points, dim=1).cpu().numpy()

    def _move(self, rows: Tensor) -> Tensor:
        """The assignment of least cost: neurons of pieces that are always on cost nothing."""
        ffn = self.ffn
        tokens = ffn.draw("split assign", _ASSIGN_TOKENS, self.train)
        chosen = select(ffn.x[tokens], rows, top_k=self.top_k)
        cost = self.score[tokens].square().T @ (~chosen).to(ffn.h.dtype)  # [f, R]
        sizes = [self.size] * len(rows)
        if self.always:
            cost = torch.cat([torch.zeros_like(cost[:, :1]), cost], dim=1)
            sizes = [self.always * self.size, *sizes]
        group = torch.from_numpy(assign(cost.cpu().double().numpy(), sizes))
        return group.sort(stable=True).indices.to(ffn.h.device).view(self.pieces, self.size)
