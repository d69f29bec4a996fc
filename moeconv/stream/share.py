"""What several processes exchange: rows that each has a share of, and tensors that one of them made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from moeconv.world import current, summed


@dataclass(frozen=True, eq=False)
class Share:
    """The windows of the data that the stream of this process has: their numbers `mine` int64 [n], out of `windows`."""

    mine: Tensor
    windows: int

    @classmethod
    def whole(cls, windows: int) -> Share:
        """All windows."""
        return cls(torch.arange(windows), windows)

    def rows(self, length: int) -> Tensor:
        """The numbers int64 [n, length] of the tokens of these windows, among those of all windows."""
        return self.mine[:, None] * length + torch.arange(length)

    def gathered(self, values: Tensor, chosen: Tensor) -> Tensor:
        """The values [t] of the tokens `chosen` bool [n, S] of the own windows, with those of all other processes, in
        the order of the data and on the CPU."""
        if current().size == 1:
            return values.cpu()
        rows, length = self.rows(chosen.shape[1])[chosen], chosen.shape[1]
        there = joined(torch.ones(len(rows), dtype=torch.uint8), rows, self.windows * length).bool()
        return joined(values.cpu(), rows, self.windows * length)[there]


def joined(values: Tensor, rows: Tensor, total: int) -> Tensor:
    """The rows [total, ...] of all processes, of which this one has `values` [n, ...] at `rows` int64 [n], on the
    device of `values`. Every row is in one process, so that no sum rounds."""
    whole = values.new_zeros(total, *values.shape[1:])
    whole[rows.to(values.device)] = values
    return summed(whole)


def copied_from(source: int, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The `tensors` by name of the process `source`, in every process on the device where that one has them (the CPU,
    or its own CUDA device); the other processes pass None."""
    world = current()
    if world.size == 1:
        return dict(tensors or {})
    box = [[(n, t.shape, t.dtype, t.device.type) for n, t in tensors.items()] if tensors is not None else None]
    distributed.broadcast_object_list(box, src=source, device=torch.device("cpu"))
    found: dict[str, Tensor] = {}
    for name, shape, dtype, device in box[0] or ():
        own = tensors[name].contiguous() if tensors is not None else torch.empty(shape, dtype=dtype, device=device)
        distributed.broadcast(own.reshape(-1).view(torch.uint8), src=source)
        found[name] = own
    return found
