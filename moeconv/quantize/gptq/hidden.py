"""The hidden activations of experts: what their down projections read, in any family that transformers implements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moeconv.quantize.gptq.need import pair_rows
from moeconv.stream.products import OnProducts


def hidden_activations(
    experts: nn.Module, inputs: Tensor, rows: Tensor, expert: Tensor, device: torch.device
) -> Tensor:
    """The inputs of the down projections, float [n, I], for the tokens at `rows` int64 [n] of `inputs` [T, H], each
    computed by its expert of `expert` int64 [n].

    The stock module runs with one expert per token, so that gates, activations and biases are its own.
    """
    # the stock code computes one expert after the other, so that the products come in this order
    order = expert.argsort(stable=True)
    down = experts.down_proj
    assert isinstance(down, Tensor)
    width = down.shape[1 if getattr(experts, "is_transposed", False) else 2]
    result = torch.empty(len(rows), width, dtype=down.dtype, device=device)
    for pairs in order.split(pair_rows(inputs.shape[1], width)):
        given = inputs[rows[pairs]].to(device)
        with _multiplied_by(down) as found:
            experts.forward(given, expert[pairs, None].to(device), given.new_ones(len(given), 1))
        result[pairs.to(device)] = torch.cat(found)
    return result


@contextmanager
def _multiplied_by(weight: Tensor) -> Iterator[list[Tensor]]:
    """Collects the other factor of every product with `weight`, or a slice of it, inside the block."""
    place = weight.untyped_storage().data_ptr()
    found: list[Tensor] = []

    def collect(factors: Sequence[Tensor], product: Tensor) -> Tensor:
        if len(factors) > 1 and factors[1].untyped_storage().data_ptr() == place:
            found.append(factors[0])
        return product

    with OnProducts(collect):
        yield found
