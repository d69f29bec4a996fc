"""The hidden activations of experts: what their down projections read, in any family that transformers implements."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeconv.quantize.gptq.need import pair_rows
from moeconv.stream.experts import down_inputs


def hidden_activations(
    experts: nn.Module, inputs: Tensor, rows: Tensor, expert: Tensor, device: torch.device
) -> Tensor:
    """The inputs of the down projections, float [n, I], for the tokens at `rows` int64 [n] of `inputs` [T, H], each
    computed by its expert of `expert` int64 [n]. `inputs`, `rows` and `expert` are on one device, the result on
    `device`."""
    order = expert.argsort(stable=True)
    down = experts.down_proj
    assert isinstance(down, Tensor)
    width = down.shape[1 if getattr(experts, "is_transposed", False) else 2]
    result = torch.empty(len(rows), width, dtype=down.dtype, device=device)
    at_once = pair_rows(inputs.shape[1], width)
    for block, made in down_inputs(experts, inputs, rows[order], expert[order], rows_at_once=at_once):
        result[order[block].to(device)] = made
    return result
