"""What only training does to the routing: noise and temperature on the logits, and a limit of tokens per expert.

Measures of held-out data, and the model that is written, know nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeconv.errors import InputError
from moeconv.randomness import generator
from moeconv.stream.products import LINEAR, OnProducts


@dataclass
class Disturbance:
    """`noise`: standard deviation added to the logits; `temperature`: what they are divided by; `capacity_factor`: an
    expert takes at most ceil(factor * tokens * top_k / experts) of a forward pass.

    Noise is drawn for a whole batch by (seed, layer, step), so that it does not depend on how processes share it.
    """

    noise: float = 0.0
    temperature: float = 1.0
    capacity_factor: float | None = None
    seed: int = 0
    _step: int | None = None  # None: nothing is disturbed
    _rows: np.ndarray | None = None
    _total: int = 0

    @property
    def on_logits(self) -> bool:
        return self.noise > 0 or self.temperature != 1.0

    @contextmanager
    def training(self, step: int, *, rows: np.ndarray, total: int) -> Iterator[None]:
        """Inside the block the routing is disturbed; its tokens are these rows of a batch of `total` tokens."""
        self._step, self._rows, self._total = step, rows, total
        try:
            yield
        finally:
            self._step = None

    def logits(self, layer: int, logits: Tensor) -> Tensor:
        """Logits [..., E] as training sees them."""
        if self._step is None:
            return logits
        logits = logits / self.temperature
        if self.noise:
            assert self._rows is not None
            draw = generator((self.seed, "tune", "router noise", layer, self._step))
            noise = draw.standard_normal((self._total, logits.shape[-1]), np.float32)[self._rows]
            logits = logits + self.noise * torch.from_numpy(noise).to(logits).reshape(logits.shape)
        return logits

    def kept(self, chosen: Tensor, weights: Tensor, *, experts: int) -> Tensor | None:
        """Which of the chosen experts [T, k] have room for the token, the heaviest weights first (batch prioritised
        routing, arXiv 2106.05974); None when all have."""
        if self._step is None or self.capacity_factor is None:
            return None
        room = math.ceil(self.capacity_factor * chosen.numel() / experts)
        flat = chosen.reshape(-1)
        by_weight = torch.argsort(weights.detach().reshape(-1), descending=True, stable=True)
        order = by_weight[torch.argsort(flat[by_weight], stable=True)]  # by expert, then by weight
        counts = torch.bincount(flat, minlength=experts)
        place = torch.arange(len(flat), device=flat.device) - (counts.cumsum(0) - counts)[flat[order]]
        return torch.empty_like(flat, dtype=torch.bool).scatter_(0, order, place < room).view_as(chosen)


def disturbed(forward: Callable[..., Any], change: Callable[[Tensor], Tensor], *, experts: int) -> Callable[..., Any]:
    """A router's forward whose logits go through `change` before anything is chosen by them."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        met = False

        def seen(_given: Sequence[Any], logits: Tensor) -> Tensor:
            nonlocal met
            if met or logits.shape[-1] != experts:
                return logits
            met = True
            return change(logits)

        with OnProducts(seen, functions=LINEAR):
            out = forward(*args, **kwargs)
        if not met:
            raise InputError(
                "this family's router does not compute its logits as a linear layer: they cannot be disturbed",
                hint="Leave out --router-noise and --temperature.",
            )
        return out

    return wrapped
