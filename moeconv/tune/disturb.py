"""Changes to the routing during training only: noise and temperature on the logits, and a token limit per expert.

Neither the measurements on held-out data nor the model that is written have them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moeconv.errors import InputError
from moeconv.randomness import generator
from moeconv.stream.products import OnProducts, is_linear


@dataclass
class Disturbance:
    """`noise`: the standard deviation of the noise that is added to the logits; `temperature`: the divisor of the
    logits; `capacity_factor`: an expert takes at most ceil(factor * tokens * top_k / experts) tokens of a forward pass.

    Noise is drawn for a whole batch from (seed, layer, step), so that it does not depend on how processes share a
    batch.
    """

    noise: float = 0.0
    temperature: float = 1.0
    capacity_factor: float | None = None
    seed: int = 0
    _step: int | None = None  # None outside of training: nothing is changed
    _rows: np.ndarray | None = None
    _total: int = 0

    @property
    def on_logits(self) -> bool:
        return self.noise > 0 or self.temperature != 1.0

    @contextmanager
    def training(self, step: int, *, rows: np.ndarray, total: int) -> Iterator[None]:
        """Inside the block, the routing is changed. The tokens of this process are `rows` of a batch of `total`
        tokens."""
        self._step, self._rows, self._total = step, rows, total
        try:
            yield
        finally:
            self._step = None

    def logits(self, layer: int, logits: Tensor) -> Tensor:
        """The logits [..., E] as training uses them."""
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
        """Which of the chosen experts [T, k] have room for the token, as bool [T, k]; None if all have. Pairs with
        larger routing weights come first (batch prioritised routing, arXiv 2106.05974)."""
        if self._step is None or self.capacity_factor is None:
            return None
        room = math.ceil(self.capacity_factor * chosen.numel() / experts)
        flat = chosen.reshape(-1)
        by_weight = torch.argsort(weights.detach().reshape(-1), descending=True, stable=True)
        order = by_weight[torch.argsort(flat[by_weight], stable=True)]  # by expert, then by weight
        counts = torch.bincount(flat, minlength=experts)
        place = torch.arange(len(flat), device=flat.device) - (counts.cumsum(0) - counts)[flat[order]]
        return torch.empty_like(flat, dtype=torch.bool).scatter_(0, order, place < room).view_as(chosen)


def disturbed(
    forward: Callable[..., object], change: Callable[[Tensor], Tensor], *, experts: int
) -> Callable[..., object]:
    """A router's forward whose logits go through `change` before the experts are chosen. It raises InputError for a
    router whose logits are not the output of a linear layer."""

    def wrapped(*args: object, **kwargs: object) -> object:
        found = False

        def on_product(_arguments: Sequence[Tensor], logits: Tensor) -> Tensor:
            nonlocal found
            if found or logits.shape[-1] != experts:
                return logits
            found = True
            return change(logits)

        with OnProducts(on_product, among=is_linear):
            out = forward(*args, **kwargs)
        if not found:
            raise InputError(
                "the router of this family does not compute its logits by a linear layer, so that they cannot be "
                "changed",
                hint="Leave out --router-noise and --temperature.",
            )
        return out

    return wrapped
