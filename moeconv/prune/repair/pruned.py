"""Runs pruned variants of a model beside the model in one pass over its layers: masked routing, and refitted experts.

No model is written. Every variant has its own activations, and the weights of each layer are read once for all
variants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from moeconv.data.heldout import clearly_less, held_out
from moeconv.prune.repair.heal import Heal, Healed, HealOutcome, LayerData, dtypes_of, heal_layer, kept_alone
from moeconv.prune.repair.narrow import NarrowOutcome, narrow_layer
from moeconv.prune.repair.refit import Refit, RefitOutcome, held_out_errors, refit_layer, tokens_needed
from moeconv.prune.repair.wanted import FitTokens, wanted_of
from moeconv.stream.experts import down_projections, with_down
from moeconv.stream.layer import Layer
from moeconv.stream.layers import LayerStream
from moeconv.stream.masking import check_routed, routed_to
from moeconv.stream.memory import allocate

Choose = Callable[[Layer, Tensor], Sequence[int]]  # a layer, its inputs in the variant [n, S, H] -> experts to keep
OnHealed = Callable[[Layer, Healed], None]  # a layer, what became of it
OnLayer = Callable[[int, Sequence[int], Tensor], None]  # layer, experts in ascending order, down projections [n, H, I]
Downs = tuple[Sequence[int], Tensor]  # experts in ascending order, their down projections [n, H, I]


@dataclass(eq=False)
class Variant:
    """One way to prune. `keep` {layer: kept experts} (a layer that is absent keeps all), or `choose`, which decides for
    each layer when the pass reaches it.

    `replace` {layer: (experts, down projections [n, H, I])} are weights that were already changed. `scale` {layer:
    factor} multiplies the down projections of the experts. `refit` computes new down projections, which are used where
    they are clearly better than the old ones on held-out tokens; `fitted` records the result. `on_layer` is called with
    the new down projections of each layer. With `width`, every expert keeps only that many neurons: `neurons` {layer:
    [n, width]} are their numbers, and the columns of all others in its down projection become 0; `narrowed` records
    the result. `top_k` is the number of experts per token, instead of the model's own.
    With `heal`, the kept experts and the router of each layer are trained after the refit; `healed` records the
    results, and `on_healed` is called with every layer. After the pass, `hidden` [n, S, H] are the final activations of
    the variant, and `keep` has an entry for every layer.
    """

    keep: dict[int, Sequence[int]] = field(default_factory=dict)
    choose: Choose | None = None
    refit: Refit | None = None
    width: int | None = None
    top_k: int | None = None
    replace: Mapping[int, Downs] = field(default_factory=dict)
    scale: Mapping[int, float] = field(default_factory=dict)
    on_layer: OnLayer | None = None
    heal: Heal | None = None
    healed: list[HealOutcome] = field(default_factory=list)
    on_healed: OnHealed | None = None
    fitted: list[RefitOutcome] = field(default_factory=list)
    neurons: dict[int, Tensor] = field(default_factory=dict)
    narrowed: list[NarrowOutcome] = field(default_factory=list)
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))


@torch.no_grad()
def pruned_pass(stream: LayerStream, variants: Sequence[Variant], *, fit: np.ndarray | None = None) -> None:
    """Compute all layers of `stream` and of its variants. A refit uses the windows that `fit` bool [n] marks (all if it
    is None).

    Raises InputError if the stock router cannot be masked, or if a layer computes NaN.
    """
    for variant in variants:
        variant.hidden = allocate(tuple(stream.hidden.shape), stream.dtype, stream.max_memory)
        variant.hidden.copy_(stream.hidden)
    seen = np.ones(len(stream.windows), bool) if fit is None else fit
    held = np.zeros(tuple(stream.windows.shape), bool)
    held[seen] = held_out(int(seen.sum()), held.shape[1])
    tokens = FitTokens(torch.from_numpy(seen), torch.from_numpy(held))
    for layer in stream.layers():
        for _ in layer.batches():
            pass
        for variant in variants:
            if layer.experts is None:
                for _ in layer.batches(hidden=variant.hidden):
                    pass
            else:
                _pass_layer(stream, layer, variant, tokens)


def _pass_layer(stream: LayerStream, layer: Layer, variant: Variant, tokens: FitTokens) -> None:
    if variant.choose is not None:
        variant.keep[layer.index] = list(variant.choose(layer, variant.hidden))
    kept = variant.keep.get(layer.index, range(stream.model.num_experts))
    kept, replaced = sorted(kept), variant.replace.get(layer.index)
    if layer.index in variant.scale and layer.experts is not None:
        replaced = kept, down_projections(layer.experts, kept) * variant.scale[layer.index]
    if variant.refit is not None or variant.width is not None:
        replaced = kept, _fitted(stream, layer, variant, kept, tokens)
    if variant.on_layer is not None and replaced is not None:
        variant.on_layer(layer.index, *replaced)
    with masked(stream, layer, kept, top_k=variant.top_k, replaced=replaced) as stack:
        if variant.heal is not None:
            part = stack.enter_context(kept_alone(layer, kept, num_experts=stream.model.num_experts))
            _heal(stream, layer, variant, part, tokens)
        for batch in layer.batches(hidden=variant.hidden):
            assert batch.top_k_index is not None and batch.top_k_weights is not None
            check_routed(batch.top_k_index, batch.top_k_weights, kept, top_k=variant.top_k, layer=layer.index)


def _heal(stream: LayerStream, layer: Layer, variant: Variant, part: nn.Module, tokens: FitTokens) -> None:
    """Train a pruned layer, and report the result."""
    assert variant.heal is not None and variant.on_healed is not None
    training = tokens.windows[:, None] & ~tokens.held
    data = LayerData(variant.hidden, stream.hidden, training, tokens.held)
    with torch.enable_grad():
        neurons, trains = variant.neurons.get(layer.index), None
        if neurons is not None:
            trains = torch.zeros(len(neurons), stream.model.expert_width, dtype=torch.bool, device=neurons.device)
            trains.scatter_(1, neurons, True)
        dtypes = dtypes_of(stream.model, layer.index)
        made = heal_layer(stream, layer, part, data, variant.heal, dtypes, trains=trains)
    variant.healed.append(made.outcome)
    variant.on_healed(layer, made)


def masked(
    stream: LayerStream, layer: Layer, kept: Sequence[int], *, top_k: int | None = None,
    replaced: Downs | None = None,
) -> ExitStack:  # fmt: skip
    """A context in which the router can choose only the kept experts."""
    assert layer.router is not None and layer.experts is not None
    stack = ExitStack()
    stack.enter_context(
        routed_to(
            layer.router,
            layer.ffn,
            kept,
            num_experts=stream.model.num_experts,
            biases=layer.biases,
            top_k=top_k,
            top_k_keys=stream.model.family.experts.top_k,
        )
    )
    if replaced is not None:
        stack.enter_context(with_down(layer.experts, *replaced))
    return stack


def _fitted(stream: LayerStream, layer: Layer, variant: Variant, kept: Sequence[int], tokens: FitTokens) -> Tensor:
    """The new down projections [n, H, I] of the kept experts, after a refit or with fewer neurons. A refit keeps the
    old ones where the new ones are not clearly better on the held-out tokens, or if there are too few tokens."""
    assert layer.experts is not None
    refit = variant.refit
    target = "layer" if refit is None else refit.target
    wanted = wanted_of(
        stream, layer, variant.hidden, tokens, target=target,
        masked=lambda: masked(stream, layer, kept, top_k=variant.top_k),
    )  # fmt: skip
    before = down_projections(layer.experts, kept)
    if variant.width is not None:
        made = narrow_layer(layer.index, layer.experts, wanted, kept, before, variant.width, refit)
        variant.neurons[layer.index] = made.neurons
        variant.narrowed.append(made.outcome)
        variant.fitted += [] if made.fitted is None else [made.fitted]
        return made.down
    assert refit is not None
    fitted = refit_layer(layer.experts, wanted.routes, wanted.missing, kept, before, refit)
    change = fitted.float() - before.float()
    old, new = held_out_errors(layer.experts, wanted.held_routes, wanted.held_missing, kept, change)
    available, needed = wanted.tokens_per_expert(len(kept)), tokens_needed(before)
    better = available >= needed and clearly_less(new.cpu(), old.cpu())
    was, now = wanted.relative(old), wanted.relative(new)
    variant.fitted.append(RefitOutcome(layer.index, was, now, available, needed, kept=better))
    return fitted if better else before
