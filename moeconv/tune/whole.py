"""Training through the whole stock model: KL to a teacher's logits, next-token loss, or the balance loss alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moeconv.families.records import Routing
from moeconv.tune import losses
from moeconv.tune.disturb import Disturbance
from moeconv.tune.losses import RoutingLoad
from moeconv.tune.network import Network
from moeconv.tune.rebalance import Rebalance
from moeconv.tune.routing import Routed
from moeconv.world import current, summed


@dataclass(frozen=True)
class ModelMeasure:
    """Measured on held-out data: the losses in nats per token (`kl` is None without a teacher), the balance loss, and
    the load of each layer."""

    loss: float
    kl: float | None
    balance: float
    loads: dict[int, RoutingLoad]


@dataclass(frozen=True)
class ModelTraining:
    """The training of a student as a whole. `take` returns the routing since its last call.

    Of several processes, each computes every n-th window of a batch, and its losses are its part of the losses of the
    batch.
    """

    student: Network
    teacher: Network | None
    rule: Routing
    take: Callable[[], list[Routed]]
    objective: str
    balance: float
    z_loss: float
    device: torch.device
    disturbance: Disturbance
    rebalance: Rebalance | None = None

    def tokens(self, windows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(windows, np.int64)).to(self.device)

    def step(self, windows: np.ndarray, *, number: int) -> float:
        """Compute the gradients of the batch `number`, int64 [B, S]. Returns the loss of this process's part; NaN where
        nothing has a gradient."""
        world = current()
        tokens = self.tokens(windows[world.rank :: world.size])
        rows = np.arange(windows.size).reshape(windows.shape)[world.rank :: world.size].reshape(-1)
        with self.disturbance.training(number, rows=rows, total=windows.size):
            hidden = self.student.hidden(tokens)
        routed = self.take()
        extra: list[Tensor] = []
        if self.balance or self.rebalance:
            counts = losses.counts_of(routed)
            if self.balance:
                extra.append(self.balance * losses.balance_loss(routed, self.rule, counts))
            if self.rebalance:
                self.rebalance(counts)
        if self.z_loss:
            extra.append(self.z_loss * losses.z_loss(routed, tokens=windows.size))
        grads: list[Tensor | None] = [None] * len(extra)
        total = sum(float(x.detach()) for x in extra)
        if self.objective != "balance":
            loss, flat = self._rows(hidden, tokens)
            count = len(flat) * len(windows) // len(tokens)
            value, grad = losses.mean_and_gradient(flat, loss, vocabulary=self.student.vocabulary, count=count)
            extra.append(flat)
            grads.append(grad)
            total += float(value)
        live = [(x, g) for x, g in zip(extra, grads) if x.requires_grad]
        if live:
            torch.autograd.backward([x for x, _ in live], [g for _, g in live])
        return total if live else math.nan

    def _rows(self, hidden: Tensor, tokens: Tensor) -> tuple[losses.Rows, Tensor]:
        """(the loss of each row, the final hidden states [T, H] that it is computed on)."""
        if self.objective == "distill":
            return self._divergence(tokens), hidden.flatten(0, 1)
        return losses.next_token(self.student.head, tokens[:, 1:].flatten()), hidden[:, :-1].flatten(0, 1)

    def _divergence(self, tokens: Tensor) -> losses.Rows:
        assert self.teacher is not None
        with torch.no_grad():
            target = self.teacher.hidden(tokens).flatten(0, 1)
        return losses.divergence(self.student.head, self.teacher.head, target)

    def measure(self, windows: np.ndarray, *, batch_size: int) -> ModelMeasure:
        """Measure loss, KL and load over all windows, int64 [N, S]."""
        world = current()
        loads = {b.layer: RoutingLoad(b.layer, b.num_experts, self.rule) for b in self.student.blocks}
        sums = torch.zeros(2, dtype=torch.float64)  # next-token loss, KL
        count = windows.shape[0] * (windows.shape[1] - 1)
        for first in range(0, len(windows), batch_size):
            mine = windows[first : first + batch_size][world.rank :: world.size]
            tokens = self.tokens(mine if len(mine) else windows[:1])  # every process must run where layers are sharded
            with torch.no_grad():
                hidden = self.student.hidden(tokens)
            routed = self.take()
            kl = self._divergence(tokens) if self.teacher is not None else None
            if not len(mine):
                continue
            for layer in routed:
                loads[layer.layer].add(layer)
            rows = losses.next_token(self.student.head, tokens[:, 1:].flatten())
            sums[0] += losses.total(hidden[:, :-1].flatten(0, 1), rows, vocabulary=self.student.vocabulary)
            if kl is not None:
                sums[1] += losses.total(hidden.flatten(0, 1), kl, vocabulary=self.student.vocabulary)
        loss, kl_sum = summed(sums).tolist()
        whole = [load.together() for load in loads.values()]
        # a correction bias changes the load but not the probabilities, so only the load shows its effect
        uneven = [load.unevenness() if self.rebalance else load.balance() for load in whole]
        balance = float(np.mean(uneven)) if uneven else 0.0
        return ModelMeasure(loss / count, kl_sum / windows.size if self.teacher is not None else None, balance, loads)

    def score(self, measured: ModelMeasure) -> float:
        """The number that training minimises on held-out data."""
        if self.objective == "balance":
            return measured.balance
        return float(measured.kl) if self.objective == "distill" and measured.kl is not None else measured.loss
