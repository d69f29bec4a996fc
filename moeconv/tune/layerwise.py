"""Training a layer at a time: each Mixture-of-Experts layer learns the teacher's FFN on the teacher's own inputs to it.

Minimises ||MoE(x) - FFN(x)||^2 / ||FFN(x)||^2. In memory at a time: a layer of one of the models, the bytes of the
teacher's next one, and the activations in front of and behind one FFN, whatever the number of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeconv.families.model import Model
from moeconv.families.records import Routing
from moeconv.plan.meter import Meter
from moeconv.stream.layers import stream_within
from moeconv.stream.memory import allocate, release_memory
from moeconv.stream.skeleton import Skeleton
from moeconv.tune import losses
from moeconv.tune.disturb import Disturbance
from moeconv.tune.losses import RoutingLoad
from moeconv.tune.need import FLOWS, layerwise_need
from moeconv.tune.network import FilledBlock, fill_block
from moeconv.tune.rebalance import Rebalance
from moeconv.tune.routing import Routed
from moeconv.world import current, summed


@dataclass(frozen=True)
class LayerMeasure:
    """Held-out tokens: error relative to the teacher's output, and the layer's load."""

    error: float
    load: RoutingLoad


@dataclass(frozen=True)
class LayerTraining:
    """One layer to be fitted. inputs and outputs: the teacher's FFN's in this process, [T, H]: its windows (`seq_len`
    tokens; every so many-th of all processes') that train, then its held-out ones, the last `held` rows."""

    filled: FilledBlock
    inputs: Tensor
    outputs: Tensor
    held: int
    seq_len: int
    rule: Routing
    take: Callable[[], list[Routed]]
    balance: float
    z_loss: float
    device: torch.device
    disturbance: Disturbance
    rebalance: Rebalance | None = None

    def _run(self, rows: Any) -> tuple[Tensor, Tensor, list[Routed]]:
        """Squared error and squared norm of the target over some rows, and the routing."""
        inputs, wanted = self.inputs[rows].to(self.device), self.outputs[rows].to(self.device)
        made = self.filled.module(inputs[None])
        made = (made[0] if isinstance(made, tuple) else made).reshape(inputs.shape)
        return (made - wanted).square().sum(), wanted.square().sum(), self.take()

    def _mine(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of rows of all training tokens: which of them are here, and where."""
        world = current()
        window: np.ndarray = rows // self.seq_len
        here = np.flatnonzero(window % world.size == world.rank)
        return here, window[here] // world.size * self.seq_len + rows[here] % self.seq_len

    def step(self, rows: np.ndarray, *, number: int) -> bool:
        """Gradients of a batch of rows of all training tokens, the `number`-th. Returns whether the loss is finite."""
        here, local = self._mine(rows)
        with self.disturbance.training(number, rows=here, total=len(rows)):
            error, norm, routed = self._run(torch.from_numpy(local))
        loss = error / summed(norm).clamp_min(torch.finfo(norm.dtype).tiny)
        if self.balance or self.rebalance:
            counts = losses.counts_of(routed)
            if self.balance:
                loss = loss + self.balance * losses.balance_loss(routed, self.rule, counts)
            if self.rebalance:
                self.rebalance(counts)
        if self.z_loss:
            loss = loss + self.z_loss * losses.z_loss(routed, tokens=len(rows))
        loss.backward()
        return bool(loss.isfinite())

    @torch.no_grad()
    def measure(self, *, batch: int) -> LayerMeasure:
        """The held-out rows, `batch` at a time."""
        sums = torch.zeros(2, dtype=torch.float64)  # squared error, squared norm
        load = RoutingLoad(self.filled.block.layer, self.filled.block.num_experts, self.rule)
        for first in range(len(self.inputs) - self.held, len(self.inputs), batch):
            part, whole, routed = self._run(slice(first, min(first + batch, len(self.inputs))))
            sums += torch.stack([part, whole]).double().cpu()
            load.add(routed[0])
        error, norm = summed(sums).tolist()
        return LayerMeasure(error / norm if norm else error, load.together())


def each_layer(
    student: Model,
    teacher: Model,
    windows: np.ndarray,
    *,
    batch_size: int,
    device: torch.device,
    max_memory: int | None,
    meter: Meter,
    trains_experts: bool = False,
) -> Iterator[tuple[FilledBlock, Tensor, Tensor]]:
    """For every MoE layer: the student's block, and the teacher's FFN inputs and outputs [T, H].

    Activations beyond `max_memory` bytes lie in files that are mapped into memory.
    """
    need = layerwise_need(
        student, teacher, tokens=windows.size, seq_len=windows.shape[1], batch_size=batch_size, experts=trains_experts
    )
    stream = stream_within(
        teacher, windows, dtype=torch.float32, device=device, batch_size=batch_size, budget=max_memory, meter=meter,
        what="tune", flows=FLOWS, beside=[need],
    )  # fmt: skip
    skeleton, share = Skeleton(student, dtype=torch.float32, device=device), stream.max_memory
    shape = (windows.size, student.hidden_size)
    for layer in stream.layers():
        if layer.index not in student.moe_layers:
            continue
        inputs, outputs = (allocate(shape, torch.float32, share) for _ in range(2))
        for batch in layer.batches():
            rows = slice(batch.rows.start * windows.shape[1], batch.rows.stop * windows.shape[1])
            inputs[rows].copy_(batch.ffn_input)
            outputs[rows].copy_(batch.ffn_output)
        layer.free()  # the teacher's layer and the student's are never in memory together
        filled = fill_block(skeleton, layer.index)
        yield filled, inputs, outputs
        skeleton.empty(filled.module)
        del inputs, outputs
        release_memory()
