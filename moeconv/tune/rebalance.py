"""Load balancing without a loss: a bias on each expert's score, used only for the choice, which falls with high load.

DeepSeek-V3 (arXiv 2412.19437) and Wang et al. (arXiv 2408.15664): b_e += u * sign(mean load - load_e) after each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from moeconv.tune.routing import Block

Rebalance = Callable[[Tensor], None]  # takes the counts [layers, E] of a batch, in the order of the blocks


def rebalancing(blocks: Iterable[Block], *, step: float) -> Rebalance:
    """A function that changes the correction biases of the blocks by `step` (u), once per call."""
    biases = [block.bias for block in blocks]

    @torch.no_grad()
    def rebalance(counts: Tensor) -> None:
        for bias, count in zip(biases, counts, strict=True):
            assert bias is not None
            bias += step * torch.sign(count.mean() - count).to(bias).view_as(bias)

    return rebalance
