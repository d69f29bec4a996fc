"""A linear router for groups of neurons, fitted on FFN inputs so that the missing part of the output is small.

The routers of transformers are one matrix, so the fitted one is linear. (MoEfication, arXiv 2110.01786, and CMoE, arXiv
2502.04416, score groups by a non-linear function.) There are two regressions: ridge regression on the norm of a group's
output, and logistic regression on the groups that a greedy oracle chooses. The caller takes the better one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_ELEMENTS = 1 << 25  # elements of the groups' outputs that are computed at a time
_RIDGE = 1e-3  # as a share of the mean of the diagonal
_DECAY = 1e-4
_STEPS = 60


def outputs(h: Tensor, down: Tensor, groups: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(tokens, outputs [t, G, H]) of groups of neurons, for some tokens at a time. `h` [n, f] are the activations,
    `down` [H, f] is the projection, `groups` int64 [G, w] has the neurons of each group."""
    matrices = down[:, groups].permute(1, 2, 0)  # [G, w, H]
    step = max(1, _ELEMENTS // (max(1, groups.shape[0]) * down.shape[0]))
    for first in range(0, len(h), step):
        at = slice(first, min(first + step, len(h)))
        yield at, torch.einsum("tgw,gwh->tgh", h[at][:, groups], matrices)


def output_norms(h: Tensor, down: Tensor, groups: Tensor) -> Tensor:
    """The norm of every group's output, [n, G]."""
    return torch.cat([made.norm(dim=-1) for _, made in outputs(h, down, groups)])


def oracle(h: Tensor, down: Tensor, groups: Tensor, *, top_k: int) -> Tensor:
    """The `top_k` groups that a greedy search chooses so that the rest of the output is smallest: bool [n, G]."""
    return torch.cat([_greedy(made, top_k) for _, made in outputs(h, down, groups)])


def _greedy(made: Tensor, top_k: int) -> Tensor:
    products = made @ made.transpose(1, 2)  # [t, G, G]
    own = products.diagonal(dim1=1, dim2=2)
    chosen = torch.zeros(made.shape[:2], dtype=torch.bool, device=made.device)
    for _ in range(top_k):
        rest = (products @ (~chosen)[:, :, None].to(made.dtype))[:, :, 0]  # <f_g, sum of those not chosen>
        gain = (2 * rest - own).masked_fill(chosen, -torch.inf)
        chosen.scatter_(1, gain.argmax(1, keepdim=True), True)
    return chosen


def ridge(x: Tensor, target: Tensor) -> Tensor:
    """Rows [G, H] of the ridge regression of `target` [n, G] on `x` [n, H]. There is no intercept: after an RMSNorm,
    the inputs contain a nearly constant direction."""
    wide = x.double()
    gram = wide.T @ wide
    gram += _RIDGE * gram.diagonal().mean().clamp_min(1e-30) * torch.eye(len(gram), dtype=gram.dtype, device=x.device)
    solved: Tensor = torch.linalg.solve(gram, wide.T @ target.double())
    return solved.T.to(x.dtype)


def logistic(x: Tensor, chosen: Tensor, *, weight: Tensor) -> Tensor:
    """Rows [G, H] of logistic regressions of `chosen` bool [n, G] on x [n, H], tokens weighted by `weight` [n]."""
    rows = torch.zeros(chosen.shape[1], x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    target, weight = chosen.to(x.dtype), weight / weight.mean()
    optimiser = torch.optim.LBFGS([rows], max_iter=_STEPS, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(x @ rows.T, target, reduction="none").mean(1)
        total = (loss * weight).mean() + _DECAY * rows.square().sum() / len(rows)
        total.backward()
        return total

    with torch.enable_grad():
        optimiser.step(closure)
    return rows.detach()


def select(x: Tensor, rows: Tensor, *, top_k: int) -> Tensor:
    """The `top_k` groups that router rows [G, H] choose for inputs `x` [n, H]: bool [n, G]."""
    chosen = torch.zeros(len(x), len(rows), dtype=torch.bool, device=x.device)
    return chosen.scatter_(1, torch.topk(x @ rows.T, top_k, dim=1).indices, True) if top_k else chosen


def missing(h: Tensor, down: Tensor, groups: Tensor, chosen: Tensor) -> Tensor:
    """The part of the output that is missing because some groups are not chosen: [n, H]."""
    off = torch.zeros_like(h)
    off[:, groups.flatten()] = (~chosen).to(h.dtype).repeat_interleave(groups.shape[1], dim=1)
    return (h * off) @ down.T
