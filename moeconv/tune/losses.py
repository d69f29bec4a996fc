"""The losses of training (next-token, KL, balance, router z-loss), and the count of the routing load.

Logits are computed a few rows at a time, so that the logits of a whole batch are never in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from moeconv.calibrate.routing import LoadCounter
from moeconv.contract import Load
from moeconv.families.records import Routing
from moeconv.tune.routing import Routed
from moeconv.world import summed

_LOGITS = 1 << 23  # number of logits that are computed at a time

Rows = Callable[[Tensor, slice], Tensor]  # final hidden states of some rows [R, H] -> the loss of each row [R]


def next_token(head: Callable[[Tensor], Tensor], labels: Tensor) -> Rows:
    """Next-token cross-entropy in nats. labels: int64 [T]."""
    return lambda hidden, at: cross_entropy(head(hidden).float(), labels[at], reduction="none")


def divergence(head: Callable[[Tensor], Tensor], teacher: Callable[[Tensor], Tensor], target: Tensor) -> Rows:
    """KL(teacher || student) in nats per row. target: the teacher's final hidden states [T, H']."""

    def rows(hidden: Tensor, at: slice) -> Tensor:
        with torch.no_grad():
            wanted = log_softmax(teacher(target[at]).float(), dim=-1)
        return (wanted.exp() * (wanted - log_softmax(head(hidden).float(), dim=-1))).sum(-1)

    return rows


def in_slices(count: int, vocabulary: int) -> list[slice]:
    """Divide `count` rows into slices so small that the logits of one slice fit in memory."""
    size = max(1, _LOGITS // vocabulary)
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def total(hidden: Tensor, rows: Rows, *, vocabulary: int) -> float:
    """Sum of the rows' losses, without a gradient. hidden: [T, H]."""
    with torch.no_grad():
        return sum(float(rows(hidden[at], at).double().sum()) for at in in_slices(len(hidden), vocabulary))


def mean_and_gradient(
    hidden: Tensor, rows: Rows, *, vocabulary: int, count: int | None = None
) -> tuple[float, Tensor]:  # fmt: skip
    """(mean of the rows' losses, its gradient with respect to `hidden` [T, H]). `count` is the number of rows of all
    processes, if these rows are a part of them."""
    count = len(hidden) if count is None else count
    leaf = hidden.detach().requires_grad_()
    value = 0.0
    for at in in_slices(len(hidden), vocabulary):
        part = rows(leaf[at], at).sum() / count
        part.backward()
        value += float(part.detach())
    assert leaf.grad is not None
    return value, leaf.grad


# -- routers ---------------------------------------------------------------------------------------------------------


def probabilities(logits: Tensor, rule: Routing) -> Tensor:
    """Router probabilities [T, E] that sum to one, whatever the score function."""
    if rule.score == "sigmoid":
        scores = torch.sigmoid(logits.float())
        return scores / scores.sum(-1, keepdim=True)
    return torch.softmax(logits.float(), dim=-1)


def counts_of(routed: Sequence[Routed]) -> Tensor:
    """How often each expert of each layer was chosen in all processes: float64 [layers, E]."""
    counts = [torch.bincount(r.chosen.reshape(-1), minlength=r.logits.shape[1]) for r in routed]
    return summed(torch.stack(counts).double())


def balance_loss(routed: Sequence[Routed], rule: Routing, counts: Tensor) -> Tensor:
    """E * sum_e f_e P_e of each layer, the mean over layers; 1 when balanced, E when one expert takes all.

    f: share of the chosen slots (`counts` [layers, E]), P: mean probability (Switch Transformer, arXiv 2101.03961).
    Layers are not pooled, because layers that each collapse on another expert would together look balanced. Of several
    processes, each gets the part of the loss of its own tokens.
    """
    losses = []
    for layer, count in zip(routed, counts):
        p = probabilities(layer.logits, rule)
        slots = count.sum()
        share, tokens = (count / slots).to(p.dtype), slots / layer.chosen.shape[1]
        losses.append(p.shape[1] * (share * p.sum(0)).sum() / tokens)
    return torch.stack(losses).mean()


def z_loss(routed: Sequence[Routed], *, tokens: int) -> Tensor:
    """Mean over `tokens` and layers of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906)."""
    return torch.stack([layer.logits.float().logsumexp(-1).square().sum() / tokens for layer in routed]).mean()


class RoutingLoad:
    """The routing of one layer, counted over batches: how even it is, and its balance loss over all batches."""

    def __init__(self, layer: int, experts: int, rule: Routing) -> None:
        self._counter = LoadCounter(layer, experts)
        self._probability = torch.zeros(experts, dtype=torch.float64)
        self._rule = rule

    def add(self, routed: Routed) -> None:
        self._counter.add(router_logits=routed.logits, top_k_index=routed.chosen)
        self._probability += probabilities(routed.logits, self._rule).double().sum(0).cpu()

    def together(self) -> RoutingLoad:
        """This load with the counts of all processes added."""
        counter = self._counter
        counter.counts = summed(torch.from_numpy(counter.counts)).numpy()
        both = summed(torch.tensor([counter.entropy_sum, counter.tokens], dtype=torch.float64))
        counter.entropy_sum, counter.tokens = float(both[0]), int(both[1])
        summed(self._probability)
        return self

    def unevenness(self) -> float:
        """E * sum_e f_e^2 of the shares f of the load; 1 if the load is even. This is the balance loss with f in place
        of P."""
        share = self._counter.counts / self._counter.counts.sum()
        return float(len(share) * (share * share).sum())

    def balance(self) -> float:
        """The balance loss over all tokens that were counted."""
        share = torch.from_numpy(self._counter.counts / self._counter.counts.sum())
        return float(len(share) * (share * self._probability / self._counter.tokens).sum())

    def to_json(self) -> Load:
        """{layer, load, entropy, max_over_mean, dead}, as the JSON contract names them."""
        return self._counter.result()
