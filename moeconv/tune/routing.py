"""The Mixture-of-Experts blocks of a stock model while they train: what the router said, and its gradient.

transformers' blocks of every family call `experts(hidden, top_k_index, top_k_weights)`, experts being fused into two
parameters; the module that holds the router's weight returns its logits, alone or first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from moeconv.families.records import Routing
from moeconv.tune.disturb import Disturbance, disturbed


@dataclass(frozen=True)
class Block:
    """One layer's router (`weight: [E, H]`) and fused experts (`gate_up_proj: [E, 2I, H]`, `down_proj: [E, H, I]`).

    `bias` [E] or [1, E] is added to the scores for the choice alone; None in a layer without one. `scale`: the router's
    rows lie in memory divided by it, and its inputs are multiplied by it, where rows were written so small that all
    chosen experts weigh the same (`upcycle --method split`): they train as if they were not.
    """

    layer: int
    router: Any
    experts: Any
    bias: Tensor | None = None
    scale: float = 1.0

    @property
    def num_experts(self) -> int:
        return int(self.experts.gate_up_proj.shape[0])


@dataclass(frozen=True)
class Routed:
    """What a layer's router did with a batch: logits [T, E] with their gradient, chosen experts [T, k]."""

    layer: int
    logits: Tensor
    chosen: Tensor


# -- the gradient --------------------------------------------------------------------------------------------------


def straight_through_weights(logits: Tensor, chosen: Tensor, weights: Tensor, rule: Routing, renormalise: bool):
    """Expert weights [T, E]: the family's own where an expert was chosen, else zero; the gradient reaches all experts.

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
    """Zero in the forward pass; in the backward pass, what each expert that a token did not choose would have given.

    Keeps only the layer's input: the hidden activations of all experts are computed again, one expert at a time.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, hidden: Tensor, chosen: Tensor, experts: Any) -> Tensor:
        """weights: [T, E], hidden: [T, H], chosen: [T, k] -> zeros [T, H]."""
        ctx.save_for_backward(weights, hidden, chosen)
        ctx.experts = experts
        return torch.zeros_like(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        weights, hidden, chosen = ctx.saved_tensors
        missed = torch.ones(weights.shape, dtype=torch.bool, device=weights.device).scatter_(1, chosen, False)
        slope = torch.zeros_like(weights)
        for e in range(weights.shape[1]):
            rows = missed[:, e].nonzero().squeeze(1)
            inner = _activations(ctx.experts, e, hidden.index_select(0, rows))
            # <grad, f_e(x)> = <down^T grad, inner>: no need for the expert's output
            back = grad.index_select(0, rows) @ ctx.experts.down_proj[e].detach()
            slope[rows, e] = (back * inner).sum(-1).to(slope.dtype)
        return slope, None, None, None


def _activations(experts: Any, e: int, hidden: Tensor) -> Tensor:
    return _gated(experts, linear(hidden, experts.gate_up_proj[e].detach()))


def _gated(experts: Any, wide: Tensor) -> Tensor:
    """The stock class's activation of [n, 2I], whatever it is: [n, I]."""
    made: Tensor = experts._apply_gate(wide)  # noqa: SLF001 (the class has no public one)
    return made


def experts_forward(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The chosen experts only. hidden: [T, H], chosen and weights: [T, k] -> [T, H]. Differentiable in all of them.

    Rows are sorted by expert once. unbind and index_select rather than indexing: their backward passes stack and add,
    where those of indexing fill a tensor of the full size for each expert.
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


# -- the blocks at work ----------------------------------------------------------------------------------------------


@contextmanager
def watching(
    blocks: Sequence[Block], rule: Routing, *, renormalise: bool, straight_through: bool,
    disturbance: Disturbance | None = None,
) -> Iterator[Callable[[], list[Routed]]]:  # fmt: skip
    """Replace the experts' forward passes; yields a function that takes what the routers did since the last call.

    With `straight_through` the routers' gradient goes through all experts, else through the chosen ones alone.
    """
    disturbance = disturbance or Disturbance()
    logits: dict[int, Tensor] = {}
    seen: dict[int, Routed] = {}
    handles = []
    for block in blocks:
        handles.append(block.router.register_forward_hook(_note(block, logits)))
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
            vars(block.experts).pop("forward", None)  # the class's own comes back
            vars(block.router).pop("forward", None)


def _note(block: Block, logits: dict[int, Tensor]) -> Callable[..., None]:
    def hook(_module: Any, _inputs: Any, output: Any) -> None:
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
