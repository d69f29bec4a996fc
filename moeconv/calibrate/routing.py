"""How evenly a router spreads tokens: load, entropy and dead experts, in the words of the JSON contract."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def router_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax over `logits` [T, E]: float64 [T]."""
    logs = torch.log_softmax(logits.double(), dim=-1)
    return -(logs.exp() * logs).sum(-1)


def load_of_layer(layer: int, counts: np.ndarray, *, entropy_sum: float, tokens: float) -> dict[str, Any]:
    """`load` is each expert's share of the routed pairs (sum 1), `entropy` the mean router entropy in nats,
    `max_over_mean` 1 when balanced, `dead` how many experts no token reached."""
    counts = np.asarray(counts, np.float64)
    total = counts.sum()
    return {
        "layer": layer,
        "load": (counts / total if total else counts).tolist(),
        "entropy": float(entropy_sum / tokens) if tokens else 0.0,
        "max_over_mean": float(counts.max() * len(counts) / total) if total else 0.0,
        "dead": int((counts == 0).sum()),
    }


class LoadCounter:
    """Counts over batches of one layer."""

    def __init__(self, layer: int, num_experts: int) -> None:
        self.layer, self.tokens, self.entropy_sum = layer, 0, 0.0
        self.counts: np.ndarray = np.zeros(num_experts, np.int64)

    def add(self, *, router_logits: Tensor, top_k_index: Tensor) -> None:
        """`router_logits` [T, E], `top_k_index` [T, k]."""
        self.counts += torch.bincount(top_k_index.reshape(-1), minlength=len(self.counts)).cpu().numpy()
        self.entropy_sum += float(router_entropy(router_logits).sum())
        self.tokens += len(router_logits)

    def result(self) -> dict[str, Any]:
        return load_of_layer(self.layer, self.counts, entropy_sum=self.entropy_sum, tokens=self.tokens)
