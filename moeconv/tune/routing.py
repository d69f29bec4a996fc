"""The MoE blocks of a stock model during training: the outputs of the router, and its gradient.

In every family, the blocks of transformers call `experts(hidden, top_k_index, top_k_weights)`, and the experts are
fused into two parameters. The module that holds the router's weight returns its logits, alone or as the first output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from moeconv.families.records import Routing
from moeconv.stream.skeleton import Stock
from moeconv.tune.disturb import Disturbance, disturbed


@dataclass(frozen=True)
class Block:
    """One layer's router (`weight: [E, H]`) and fused experts (`gate_up_proj: [E, 2I, H]`, `down_proj: [E, H, I]`).

    `bias` [E] or [1, E] is added to the scores only for the choice; None in a layer without one. `scale` is for routers
    whose rows were written so small that all chosen experts have the same weight (`upcycle --method split`): in memory
    the rows are divided by it and their inputs are multiplied by it, so that the gradients have an ordinary size.
    """

    layer: int
    router: Stock
    experts: Stock
    bias: Tensor | None = None
    scale: float = 1.0

    @property
    def num_experts(self) -> int:
        return int(self.experts.gate_up_proj.shape[0])


@dataclass(frozen=True)
class Routed:
    """The routing of a batch in one layer: logits [T, E] with their gradient, and the chosen experts int64 [T, k]."""

    layer: int
    logits: Tensor
    chosen: Tensor


# -- the gradient --------------------------------------------------------------------------------------------------


def straight_through_weights(
    logits: Tensor, chosen: Tensor, weights: Tensor, rule: Routing, renormalise: bool
) -> Tensor:
    """Expert weights [T, E]: those of the family for chosen experts, and zero for all others. The gradient reaches all
    experts.

    The top-k choice u = score * chosen passes its gradient through as if it were the identity, then the family's rule
    follows: w = u, or w = u / sum(u), times what the family scales by. So dw_i/ds_j is that of the mixture over all
    experts, at the point that the sparse forward pass computes. With softmax scores and w = u / sum(u) it is the dense
    mixture's gradient over the chosen experts' total score: it vanishes, as it must, where all experts are alike.
    DenseMixer (Yao et al., 2025).
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = torch.sigmoid(wide) if rule.score == "sigmoid" else torch.softmax(wide, dim=-1)
    sparse = torch.zeros_like(scores).scatter(1, chosen, scores.detach().gather(1, chosen))
    through = sparse + scores - scores.detach()
    if renormalise:
        through = through / through.sum(-1, keepdim=True)
    exact = torch.zeros_like(through).scatter(1, chosen, weights.detach().to(through.dtype))
    scale = exact.sum(-1, keepdim=True) / through.detach().sum(-1, keepdim=True)
    return exact + scale * (through - through.detach())


class _Unchosen(torch.autograd.Function):
    """Zero in the forward pass. The backward pass computes the gradient of the weights of the experts that a token did
    not choose, from what these experts would have returned.

    Only the input of the layer is kept: the activations of the experts are computed again, one expert at a time.
    """

    @staticmethod
    def forward(ctx: Stock, weights: Tensor, hidden: Tensor, chosen: Tensor, experts: Stock) -> Tensor:
        """weights: [T, E], hidden: [T, H], chosen: [T, k] -> zeros [T, H]."""
        ctx.save_for_backward(weights, hidden, chosen)
        ctx.experts = experts
        return torch.zeros_like(hidden)

    @staticmethod
    def backward(ctx: Stock, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        weights, hidden, chosen = ctx.saved_tensors
        missed = torch.ones(weights.shape, dtype=torch.bool, device=weights.device).scatter_(1, chosen, False)
        slope = torch.zeros_like(weights)
        for e in range(weights.shape[1]):
            rows = missed[:, e].nonzero().squeeze(1)
            inner = _activations(ctx.experts, e, hidden.index_select(0, rows))
            # <grad, f_e(x)> = <down^T grad, inner>, which does not need the expert's output
            back = grad.index_select(0, rows) @ ctx.experts.down_proj[e].detach()
            slope[rows, e] = (back * inner).sum(-1).to(slope.dtype)
        return slope, None, None, None


def _activations(experts: Stock, e: int, hidden: Tensor) -> Tensor:
    return _gated(experts, linear(hidden, experts.gate_up_proj[e].detach()))


def _gated(experts: Stock, wide: Tensor) -> Tensor:
    """The gated activation of the stock class: [n, 2I] -> [n, I]."""
    made: Tensor = experts._apply_gate(wide)  # noqa: SLF001 (the class has no public method for it)
    return made


def experts_forward(experts: Stock, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The weighted outputs of the chosen experts. hidden: [T, H], chosen and weights: [T, k] -> [T, H]. Differentiable
    with respect to the hidden states, the weights and the parameters.

    Rows are sorted by expert once. It uses unbind and index_select instead of indexing, because the backward pass of
    indexing fills a tensor of the full size for each expert.
    """
    k = chosen.shape[1]
    flat = chosen.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts.gate_up_proj.shape[0]).tolist()
    rows = order // k
    wide = zip(hidden.index_select(0, rows).split(counts), experts.gate_up_proj.unbind(0))
    made = _gated(experts, torch.cat([linear(x, w) for x, w in wide]))
    inner = zip(made.split(counts), experts.down_proj.unbind(0))
    made = torch.cat([linear(a, w) for a, w in inner])
    made = made * weights.reshape(-1).index_select(0, order)[:, None].to(made.dtype)
    return torch.zeros_like(hidden).index_add_(0, rows, made)


# -- recording the routing -------------------------------------------------------------------------------------------


@contextmanager
def recording(
    blocks: Sequence[Block], rule: Routing, *, renormalise: bool, straight_through: bool,
    disturbance: Disturbance | None = None,
) -> Iterator[Callable[[], list[Routed]]]:  # fmt: skip
    """Replace the forward passes of the experts. Yields a function that returns the routing since its last call.

    With `straight_through`, the gradient of the routers goes through all experts, otherwise only through the chosen.
    """
    disturbance = disturbance or Disturbance()
    logits: dict[int, Tensor] = {}
    seen: dict[int, Routed] = {}
    handles = []
    for block in blocks:
        handles.append(block.router.register_forward_hook(_logits_hook(block, logits)))
        block.experts.forward = _forward(block, logits, seen, rule, renormalise, straight_through, disturbance)
        if disturbance.on_logits:
            change = _unscaled(partial(disturbance.logits, block.layer), block.scale)
            block.router.forward = disturbed(block.router.forward, change, experts=block.num_experts)

    def take() -> list[Routed]:
        routed = [seen[layer] for layer in sorted(seen)]
        seen.clear()
        return routed

    try:
        yield take
    finally:
        for handle in handles:
            handle.remove()
        for block in blocks:
            block.experts.__dict__.pop("forward", None)  # restores the method of the class
            block.router.__dict__.pop("forward", None)


def _logits_hook(block: Block, logits: dict[int, Tensor]) -> Callable[..., None]:
    """A forward hook on the router that stores its logits."""

    def hook(_module: object, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        value = output[0] if isinstance(output, tuple) else output
        logits[block.layer] = value.reshape(-1, value.shape[-1]) / block.scale

    return hook


def _unscaled(change: Callable[[Tensor], Tensor], scale: float) -> Callable[[Tensor], Tensor]:
    return change if scale == 1 else lambda logits: change(logits / scale) * scale


def _forward(
    block: Block, logits: dict[int, Tensor], seen: dict[int, Routed], rule: Routing, renormalise: bool,
    straight_through: bool, disturbance: Disturbance,
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:  # fmt: skip
    def forward(hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        routed = seen[block.layer] = Routed(block.layer, logits.pop(block.layer), chosen)
        kept = disturbance.kept(chosen, weights, experts=routed.logits.shape[1])
        if not (straight_through and routed.logits.requires_grad):
            return experts_forward(block.experts, hidden, chosen, weights if kept is None else weights * kept)
        through = straight_through_weights(routed.logits, chosen, weights, rule, renormalise)
        picked = through.gather(1, chosen)
        out = experts_forward(block.experts, hidden, chosen, picked if kept is None else picked * kept)
        return out + _Unchosen.apply(through, hidden.detach(), chosen, block.experts)

    return forward
