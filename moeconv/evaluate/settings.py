"""How `evaluate` runs a model: dtype, device, batches, and the memory that it may take."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from moeconv.families.model import Model
from moeconv.plan.meter import Meter
from moeconv.stream.layers import LayerStream, stream_within
from moeconv.stream.need import MemoryPlacement
from moeconv.stream.ragged import Ragged


@dataclass
class PassSettings:
    """How the models are run. `placed` states where the first stream keeps its experts and activations."""

    dtype: torch.dtype | None
    device: torch.device
    batch_size: int
    budget: int | None
    meter: Meter
    placed: MemoryPlacement | None = field(default=None, init=False)

    def stream(self, model: Model, windows: np.ndarray | Ragged, *, flows: int) -> LayerStream:
        """A stream over these tokens; `flows` is the number of models whose activations are held at the same time."""
        # the default implementation of the experts, where it can run: the figures are those of the code that users run
        stream = stream_within(
            model, windows, what="evaluate", judged=True, flows=flows, dtype=self.dtype, device=self.device,
            batch_size=self.batch_size, budget=self.budget, meter=self.meter,
        )  # fmt: skip
        self.placed = self.placed or stream.placement
        return stream
