"""Training layer by layer: each MoE layer learns the outputs of the teacher's FFN on the inputs of that FFN.

Minimises ||MoE(x) - FFN(x)||^2 / ||FFN(x)||^2. In memory at the same time are one layer of one of the models, the bytes
of the teacher's next layer, and the inputs and outputs of one FFN, whatever the number of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

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
    """Measured on held-out tokens: the squared error relative to the teacher's output, and the load of the layer."""

    error: float
    load: RoutingLoad


@dataclass(frozen=True)
class LayerTraining:
    """The training of one layer. `inputs` and `outputs` [T, H] are those of the teacher's FFN for the tokens of this
    process: first the training windows (of `seq_len` tokens), then the held-out ones, which are the last `held` rows.
    Of several processes, each has every n-th window. `take` returns the routing since its last call."""

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

    def _run(self, rows: Tensor | slice) -> tuple[Tensor, Tensor, list[Routed]]:
        """(squared error, squared norm of the target, the routing) over some rows."""
        inputs, wanted = self.inputs[rows].to(self.device), self.outputs[rows].to(self.device)
        made = self.filled.module(inputs[None])
        made = (made[0] if isinstance(made, tuple) else made).reshape(inputs.shape)
        return (made - wanted).square().sum(), wanted.square().sum(), self.take()

    def _mine(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(positions in `rows` of the tokens that this process has, their rows in `inputs`). `rows` number the training
        tokens of all processes."""
        world = current()
        window: np.ndarray = rows // self.seq_len
        here = np.flatnonzero(window % world.size == world.rank)
        return here, window[here] // world.size * self.seq_len + rows[here] % self.seq_len

    def step(self, rows: np.ndarray, *, number: int) -> float:
        """Compute the gradients of the batch `number`, given as rows of all training tokens. Returns the loss
        of this process's part."""
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
        return float(loss.detach())

    @torch.no_grad()
    def measure(self, *, batch: int) -> LayerMeasure:
        """Measure on the held-out rows, `batch` rows at a time."""
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
    """Yield for every MoE layer: the student's block, and the inputs and outputs [T, H] of the teacher's FFN.

    Activations of more than `max_memory` bytes are in files that are mapped into memory.
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
