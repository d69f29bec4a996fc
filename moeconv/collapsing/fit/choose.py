"""Which neurons of a layer's experts make up its dense FFN, and their columns of down.

A dense neuron computes every token, while in an expert it computed only those that the router gave it. Least squares on
the text therefore fit the columns: |Y - H D^T|^2 + ridge |D - P|^2, where H are the activations of the neurons on all
tokens, Y is the wanted output, and P are the columns times the mean weights of their experts. Where all experts are
copies of one FFN, P already gives the output exactly. Neurons then go one by one, each time the one whose removal costs
least when all others are fitted again (the optimal brain surgeon; Hassibi and Stork, 1993).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moeconv.collapsing.fit.merged import Merged
from moeconv.collapsing.fit.neurons import Neurons
from moeconv.collapsing.need import CANDIDATES
from moeconv.data.heldout import clearly_less
from moeconv.prune.repair.surgeon import kept_neurons, removals
from moeconv.randomness import generator

RIDGE = 0.01  # in mean squared activations
_ROWS = 4096  # tokens whose activations are computed at a time

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class DenseFfn:
    """The neurons of a dense FFN, and their columns `down` float32 [W, H]."""

    neurons: Neurons
    down: Tensor


@dataclass(frozen=True, eq=False)
class FitInputs:
    """The text of a layer: the inputs `x` [T, H] of its FFN, the wanted outputs `y` [T, H], and which tokens are `held`
    out, bool [T]. `energy` float64 [u] is how much the distinct neurons add to the output of the experts."""

    x: Tensor
    y: Tensor
    held: Tensor
    energy: Tensor


@dataclass(frozen=True)
class CollapseOutcome:
    """What became of a layer: its distinct neurons, and on its held-out tokens the relative error of the output of the
    dense FFN. `fitted`: its columns of down are those of the fit, which is clearly better there than the mean of the
    experts; `mean_error` is the error of the latter."""

    layer: int
    distinct: int
    error: float | None = None
    mean_error: float | None = None
    fitted: bool = False


def hidden_of(neurons: Neurons, act: Activation, x: Tensor) -> Tensor:
    """The activations [T, n] of neurons for inputs x [T, H], in float32."""
    up = x.float() @ neurons.up.float().T
    return act(up) if neurons.gate is None else act(x.float() @ neurons.gate.float().T) * up


def output_of(ffn: DenseFfn, act: Activation, x: Tensor) -> Tensor:
    """The output [T, H] of a dense FFN in float32."""
    return hidden_of(ffn.neurons, act, x) @ ffn.down


def with_largest(merged: Merged, score: Tensor, count: int) -> Tensor:
    """int64: the `count` neurons of the largest score [u], in ascending order; those of the shared expert first."""
    score = score.double() / score.double().max().clamp_min(1e-300) + merged.shared.double() * 2
    return score.argsort(descending=True, stable=True)[:count].sort().values


def norms(merged: Merged) -> Tensor:
    """float64 [u]: the product of the norms of a neuron's weights. Scaling one of them up and another down by the same
    factor changes neither the function nor the product."""
    found = merged.down.norm(dim=1)
    for rows in (merged.neurons.gate, merged.neurons.up):
        if rows is not None:
            found = found * rows.double().norm(dim=1)
    return found


def without_data(merged: Merged, width: int, how: str, key: tuple[object, ...]) -> DenseFfn:
    """The FFN that the weights decide: the neurons of the largest norms, or random ones."""
    score = norms(merged) if how == "norm" else drawn(len(merged), key)
    chosen = with_largest(merged, score, width)
    return DenseFfn(merged.neurons.some(chosen), merged.down[chosen].float())


def drawn(count: int, key: tuple[object, ...]) -> Tensor:
    """float64 [count]: random scores, all different."""
    return torch.from_numpy(generator(key).permutation(count)).double() + 1


def fitted_to(
    merged: Merged, act: Activation, given: FitInputs, width: int, how: str, layer: int, key: tuple[object, ...]
) -> tuple[DenseFfn, CollapseOutcome]:
    """The FFN of `width` neurons that is fitted to the wanted output of a layer."""
    score = {"norm": norms, "random": lambda m: drawn(len(m), key)}.get(how, lambda _: given.energy)(merged)
    many = min(len(merged), width)
    if how == "surgeon":
        tokens = int((~given.held).sum())
        many = min(len(merged), max(width, min(CANDIDATES * width, tokens // 2)))
    some = with_largest(merged, score, many)
    mean = DenseFfn(merged.neurons.some(some), merged.down[some].float())
    gram, cross = _moments(mean, act, given)
    if many > width:
        down = _solved(gram, cross, merged.down[some])
        kept = _kept(gram, down, width, merged.shared[some])
        some, gram, cross = some[kept], gram[kept][:, kept], _cross_of(gram, cross, mean, merged, some, kept)
        mean = DenseFfn(merged.neurons.some(some), merged.down[some].float())
    fit = DenseFfn(mean.neurons, _solved(gram, cross, merged.down[some]).float())
    errors = {name: _errors(ffn, act, given) for name, ffn in (("mean", mean), ("fit", fit))}
    better = clearly_less(errors["fit"].numpy(), errors["mean"].numpy())
    square = float(given.y[given.held].double().square().sum())
    relative = {name: (float(e.sum()) / square) ** 0.5 if square else 0.0 for name, e in errors.items()}
    outcome = CollapseOutcome(layer, len(merged), relative["fit" if better else "mean"], relative["mean"], better)
    return fit if better else mean, outcome


def _cross_of(gram: Tensor, cross: Tensor, mean: DenseFfn, merged: Merged, some: Tensor, kept: Tensor) -> Tensor:
    """H^T (Y - H P^T) for the kept neurons alone: what the removed ones would have added is missing again."""
    whole = cross + gram @ mean.down.double()
    return whole[kept] - gram[kept][:, kept] @ merged.down[some[kept]].float().double()


def _moments(ffn: DenseFfn, act: Activation, given: FitInputs) -> tuple[Tensor, Tensor]:
    """(H^T H [n, n], H^T (Y - H P^T) [n, H]) over the tokens of the fit, in float64."""
    n = len(ffn.neurons)
    gram = torch.zeros(n, n, dtype=torch.float64)
    cross = torch.zeros(n, given.y.shape[1], dtype=torch.float64)
    x, y = given.x[~given.held], given.y[~given.held]
    for at in range(0, len(x), _ROWS):
        h = hidden_of(ffn.neurons, act, x[at : at + _ROWS])
        left = (y[at : at + _ROWS].float() - h @ ffn.down).double()
        wide = h.double()
        gram += wide.T @ wide
        cross += wide.T @ left
    return gram, cross


def _ridge(gram: Tensor) -> Tensor:
    """`gram` with the ridge on its diagonal."""
    ridge = RIDGE * float(gram.diagonal().mean())
    return gram + torch.eye(len(gram), dtype=gram.dtype) * (ridge if ridge > 0 else 1.0)


def _solved(gram: Tensor, cross: Tensor, prior: Tensor) -> Tensor:
    """The columns [n, H] of the fit, float64."""
    return prior + torch.cholesky_solve(cross, torch.linalg.cholesky(_ridge(gram)))


def _kept(gram: Tensor, down: Tensor, width: int, shared: Tensor) -> Tensor:
    """int64 [width]: the neurons that stay; those of the shared expert do where they fit in."""
    keep = shared if int(shared.sum()) <= width else torch.zeros_like(shared)
    order, _ = removals(_ridge(gram)[None], down.T[None], len(gram) - width, stays=keep[None])
    return kept_neurons(order, len(gram))[0]


def _errors(ffn: DenseFfn, act: Activation, given: FitInputs) -> Tensor:
    """The squared error [t] of every held-out token."""
    x, y = given.x[given.held], given.y[given.held]
    parts = [
        (output_of(ffn, act, x[at : at + _ROWS]) - y[at : at + _ROWS].float()).double().square().sum(1)
        for at in range(0, len(x), _ROWS)
    ]
    return torch.cat(parts)
