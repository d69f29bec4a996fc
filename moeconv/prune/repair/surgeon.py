"""The neurons of experts that a narrower model keeps, by the optimal brain surgeon (Hassibi and Stork, 1993).

For an expert with down projection D [H, I] and G = sum over its routed tokens of (g h)(g h)^T + ridge, where h is what
the down projection reads and g the routing weight, neurons are removed one at a time: always the neuron j whose removal
increases |(D - D') G^(1/2)|^2 the least when all remaining columns of D' are fitted again: |D_j|^2 / [G^-1]_jj. All
experts are computed at once. The rank-one updates are applied `_BATCH` at a time, as one product.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BATCH = 64  # removals between two updates of the whole matrices


def removals(gram: Tensor, down: Tensor, count: int, *, stays: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(the neurons in the order of their removal int64 [n, count], the cost of each removal float64 [n, count]).

    `gram` float64 [n, I, I] is positive definite, `down` [n, H, I] are the down projections. A cost is the increase of
    the squared error over the removals before it. Of equal costs, the neuron with the smallest number goes first.
    Neurons in `stays` bool [n, I] are not removed.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    down = down.to(gram.dtype)
    products = down.mT @ down  # the inner products of the columns of D, which the removals update
    every = torch.arange(len(gram), device=gram.device)
    gone = torch.zeros(gram.shape[:2], dtype=torch.bool, device=gram.device)
    order, costs = (torch.empty(len(gram), count, dtype=t, device=gram.device) for t in (torch.int64, gram.dtype))
    done = 0
    while done < count:
        batch = min(_BATCH, count - done)
        # inverse -= c p c^T, products = (1 - e c^T)^T products (1 - e c^T) for each removal, kept as U V^T
        left, right = (gram.new_zeros(len(gram), gram.shape[1], 3 * batch) for _ in range(2))
        steps = gram.new_zeros(len(gram), gram.shape[1], batch)
        pivots = gram.new_ones(len(gram), batch)
        scale, square = (x.diagonal(dim1=1, dim2=2).clone() for x in (inverse, products))
        for i in range(batch):
            price = torch.where(
                gone if stays is None else gone | stays, torch.inf, square.clamp_min(0) / scale.clamp_min(1e-300)
            )
            neuron = price.argmin(1)
            order[:, done + i], costs[:, done + i] = neuron, price[every, neuron]
            before = steps[every, neuron, :i] / pivots[:, :i]
            row = inverse[every, neuron] - (steps[:, :, :i] * before[:, None]).sum(2)
            row = row.masked_fill(gone, 0.0)
            pivot = row[every, neuron]
            along = row / pivot[:, None]  # what is added to the other columns of D
            inner = products[every, neuron] + (left[:, :, : 3 * i] * right[every, neuron, : 3 * i][:, None]).sum(2)
            own = inner[every, neuron]
            steps[:, :, i], pivots[:, i] = row, pivot
            # M' = M - m c^T - c m^T + m_jj c c^T
            left[:, :, 3 * i], right[:, :, 3 * i] = -inner, along
            left[:, :, 3 * i + 1], right[:, :, 3 * i + 1] = -along, inner
            left[:, :, 3 * i + 2], right[:, :, 3 * i + 2] = along * own[:, None], along
            scale = scale - row * along
            square = square - 2 * inner * along + own[:, None] * along.square()
            gone[every, neuron] = True
        inverse.baddbmm_(steps / pivots[:, None], steps.mT, alpha=-1)
        products.baddbmm_(left, right.mT)
        done += batch
    return order, costs


def kept_neurons(order: Tensor, size: int) -> Tensor:
    """The neurons that stay, in ascending order int64 [n, size - count], after the removals `order` [n, count]."""
    stays = torch.ones(len(order), size, dtype=torch.bool, device=order.device)
    stays.scatter_(1, order, False)
    return stays.nonzero()[:, 1].reshape(len(order), -1)


def fitted_columns(gram: Tensor, down: Tensor, kept: Tensor) -> Tensor:
    """The down projections [n, H, W] of the neurons `kept` int64 [n, W] whose outputs are closest to those of `down`
    [n, H, I], in the metric `gram` float64 [n, I, I]; float64."""
    at = kept[:, :, None]
    some = gram.gather(1, at.expand(-1, -1, gram.shape[2]))  # [n, W, I]
    inside = some.gather(2, kept[:, None].expand(-1, kept.shape[1], -1))
    wanted = some @ down.to(gram.dtype).mT
    return torch.cholesky_solve(wanted, torch.linalg.cholesky(inside)).mT
