"""Training through the whole stock model: KL to a teacher's logits, next-token loss, or the balance loss alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moeconv.families.spec import Routing
from moeconv.tune import losses
from moeconv.tune.losses import Load
from moeconv.tune.network import Network
from moeconv.tune.routing import Routed


@dataclass(frozen=True)
class Measured:
    """Held-out data: nats per token (kl without a teacher is None), balance loss, load per layer."""

    loss: float
    kl: float | None
    balance: float
    loads: dict[int, Load]


@dataclass(frozen=True)
class Whole:
    """A student and what it is trained on. `take` gives what the routers did since the last call."""

    student: Network
    teacher: Network | None
    rule: Routing
    take: Callable[[], list[Routed]]
    objective: str
    balance: float
    z_loss: float
    device: torch.device

    def tokens(self, windows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(windows, np.int64)).to(self.device)

    def step(self, windows: np.ndarray) -> bool:
        """Gradients of one batch [B, S]. Returns whether the loss is finite."""
        tokens = self.tokens(windows)
        hidden = self.student.hidden(tokens)
        routed = self.take()
        extra: list[Tensor] = []
        if self.balance:
            extra.append(self.balance * losses.balance_loss(routed, self.rule))
        if self.z_loss:
            extra.append(self.z_loss * losses.z_loss(routed))
        grads: list[Tensor | None] = [None] * len(extra)
        finite = all(bool(x.isfinite()) for x in extra)
        if self.objective != "balance":
            rows, flat = self._rows(hidden, tokens)
            value, grad = losses.mean_and_gradient(flat, rows, vocabulary=self.student.vocabulary)
            extra.append(flat)
            grads.append(grad)
            finite = finite and bool(np.isfinite(value))
        live = [(x, g) for x, g in zip(extra, grads) if x.requires_grad]
        if live:
            torch.autograd.backward([x for x, _ in live], [g for _, g in live])
        return finite and bool(live)

    def _rows(self, hidden: Tensor, tokens: Tensor) -> tuple[losses.Rows, Tensor]:
        """The loss of each row, and the rows [T, H] of the final hidden states that it is taken on."""
        if self.objective == "distill":
            return self._divergence(tokens), hidden.flatten(0, 1)
        return losses.next_token(self.student.head, tokens[:, 1:].flatten()), hidden[:, :-1].flatten(0, 1)

    def _divergence(self, tokens: Tensor) -> losses.Rows:
        assert self.teacher is not None
        with torch.no_grad():
            target = self.teacher.hidden(tokens).flatten(0, 1)
        return losses.divergence(self.student.head, self.teacher.head, target)

    def measure(self, windows: np.ndarray, *, batch_size: int) -> Measured:
        """Loss, KL and load over all of the windows [N, S]."""
        loads = {b.layer: Load(b.layer, b.num_experts, self.rule) for b in self.student.blocks}
        loss = kl = 0.0
        count = windows.shape[0] * (windows.shape[1] - 1)
        for first in range(0, len(windows), batch_size):
            tokens = self.tokens(windows[first : first + batch_size])
            with torch.no_grad():
                hidden = self.student.hidden(tokens)
            for routed in self.take():
                loads[routed.layer].add(routed)
            rows = losses.next_token(self.student.head, tokens[:, 1:].flatten())
            loss += losses.total(hidden[:, :-1].flatten(0, 1), rows, vocabulary=self.student.vocabulary)
            if self.teacher is not None:
                rows = self._divergence(tokens)
                kl += losses.total(hidden.flatten(0, 1), rows, vocabulary=self.student.vocabulary)
        balance = float(np.mean([load.balance() for load in loads.values()]))
        return Measured(loss / count, kl / windows.size if self.teacher is not None else None, balance, loads)

    def score(self, measured: Measured) -> float:
        """What the held-out data is judged by."""
        if self.objective == "balance":
            return measured.balance
        return float(measured.kl) if self.objective == "distill" and measured.kl is not None else measured.loss
