"""How evenly a router distributes tokens: load, entropy and dead experts, as the JSON contract names them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moeconv.contract import Load


def router_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax over `logits` [T, E]: float64 [T]."""
    logs = torch.log_softmax(logits.double(), dim=-1)
    return -(logs.exp() * logs).sum(-1)


def load_of_layer(layer: int, counts: np.ndarray, *, entropy_sum: float, tokens: float) -> Load:
    """The routing of one layer, from `counts` [E]: `load` is each expert's share of the (token, expert) pairs, with the
    sum 1; `entropy` is the mean entropy of the router in nats; `max_over_mean` is 1 where the load is balanced; `dead`
    is the number of experts that no token was routed to."""
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
    """Counts the routing of one layer over batches."""

    def __init__(self, layer: int, num_experts: int) -> None:
        self.layer, self.tokens, self.entropy_sum = layer, 0, 0.0
        self.counts: np.ndarray = np.zeros(num_experts, np.int64)

    def add(self, *, router_logits: Tensor, top_k_index: Tensor) -> None:
        """`router_logits` [T, E], `top_k_index` [T, k]."""
        self.counts += torch.bincount(top_k_index.reshape(-1), minlength=len(self.counts)).cpu().numpy()
        self.entropy_sum += float(router_entropy(router_logits).sum())
        self.tokens += len(router_logits)

    def result(self) -> Load:
        return load_of_layer(self.layer, self.counts, entropy_sum=self.entropy_sum, tokens=self.tokens)
