"""Runs pruned variants of a model beside the model in one pass over its layers: masked routing, and refitted experts.

No model is written. Every variant has its own activations, and the weights of each layer are read once for all
variants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from moeconv.data.heldout import clearly_less, held_out
from moeconv.prune.repair.heal import LayerData, dtypes_of, heal_layer, kept_alone
from moeconv.prune.repair.narrow import narrow_layer
from moeconv.prune.repair.progress import PassProgress
from moeconv.prune.repair.refit import RefitOutcome, held_out_errors, refit_layer, tokens_needed
from moeconv.prune.repair.shared import shared_narrowed
from moeconv.prune.repair.variant import Downs, Variant
from moeconv.prune.repair.wanted import FitTokens, wanted_of
from moeconv.stream.experts import down_projections, with_down
from moeconv.stream.layer import Layer
from moeconv.stream.layers import LayerStream
from moeconv.stream.masking import check_routed, routed_to
from moeconv.stream.memory import allocate
from moeconv.stream.one_ffn import one_ffn


@torch.no_grad()
def pruned_pass(
    stream: LayerStream, variants: Sequence[Variant], *, fit: np.ndarray | None = None,
    progress: PassProgress | None = None,
) -> None:  # fmt: skip
    """Compute all layers of `stream` and of its variants. A refit uses the windows that `fit` bool [n] marks (all if it
    is None). With `progress`, which takes a single variant, an interrupted pass continues. Of several processes, each
    has its share of the windows.

    Raises InputError if the stock router cannot be masked, or if a layer computes NaN.
    """
    for variant in variants:
        variant.hidden = allocate(tuple(stream.hidden.shape), stream.dtype, stream.max_memory)
        variant.hidden.copy_(stream.hidden)
    tokens = _fit_tokens(stream, fit)
    if progress is not None:
        progress.resume(variants[0])
    for layer in stream.layers():
        for _ in layer.batches():
            pass
        for variant in variants:
            if layer.experts is None:
                _pass_dense(stream, layer, variant, tokens)
            else:
                _pass_layer(stream, layer, variant, tokens)
        if progress is not None:
            progress.save(variants[0], layer.index)
    if progress is not None:
        progress.remove()


def _fit_tokens(stream: LayerStream, fit: np.ndarray | None) -> FitTokens:
    """Of the windows of this process, those for the fit, and the held-out tokens of these."""
    windows, length = stream.share.windows, stream.windows.shape[1]
    seen = np.ones(windows, bool) if fit is None else fit
    held = np.zeros((windows, length), bool)
    held[seen] = held_out(int(seen.sum()), length)
    mine = stream.share.mine
    return FitTokens(torch.from_numpy(seen)[mine], torch.from_numpy(held)[mine])


def _pass_dense(stream: LayerStream, layer: Layer, variant: Variant, tokens: FitTokens) -> None:
    """Run a layer without experts. In a dense model, its FFN loses neurons if the variant has a width."""
    cut = variant.width is not None and stream.model.family.kind != "moe"
    with ExitStack() as stack:
        if cut and stream.model.with_ffn([layer.index], every=True):
            part = one_ffn(stream.skeleton, layer)
            variant.keep[layer.index] = [0]
            down = _narrowed(stream, layer, variant, part, [0], tokens, nullcontext)
            if variant.on_layer is not None:
                variant.on_layer(layer.index, [0], down)
            stack.enter_context(with_down(part, [0], down))
        for _ in layer.batches(hidden=variant.hidden):
            pass


def _pass_layer(stream: LayerStream, layer: Layer, variant: Variant, tokens: FitTokens) -> None:
    if variant.choose is not None:
        variant.keep[layer.index] = list(variant.choose(layer, variant.hidden))
    kept = variant.keep.get(layer.index, range(stream.model.num_experts))
    kept, replaced = sorted(kept), variant.replace.get(layer.index)

    def only_kept() -> AbstractContextManager[object]:
        return masked(stream, layer, kept, top_k=variant.top_k)

    with shared_narrowed(stream, layer, variant, tokens, only_kept):
        _pass_experts(stream, layer, variant, kept, replaced, tokens)


def _pass_experts(
    stream: LayerStream, layer: Layer, variant: Variant, kept: Sequence[int], replaced: Downs | None, tokens: FitTokens
) -> None:
    """Cut, refit and heal the `kept` experts of a layer, as the variant says, and run the layer."""
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

    def only_kept() -> AbstractContextManager[object]:
        return masked(stream, layer, kept, top_k=variant.top_k)

    if variant.width is not None:
        return _narrowed(stream, layer, variant, layer.experts, kept, tokens, only_kept)
    assert refit is not None
    wanted = wanted_of(stream, layer, variant.hidden, tokens, target=refit.target, masked=only_kept)
    before = down_projections(layer.experts, kept)
    fitted = refit_layer(layer.experts, wanted.routes, wanted.missing, kept, before, refit)
    change = fitted.float() - before.float()
    errors = held_out_errors(layer.experts, wanted.held_routes, wanted.held_missing, kept, change)
    held = tokens.held & tokens.windows[:, None]
    old, new = (stream.share.gathered(squares, held) for squares in errors)
    available, needed = wanted.tokens_per_expert(len(kept)), tokens_needed(before)
    better = available >= needed and clearly_less(new, old)
    was, now = wanted.relative(old), wanted.relative(new)
    variant.fitted.append(RefitOutcome(layer.index, was, now, available, needed, kept=better))
    return fitted if better else before


def _narrowed(
    stream: LayerStream, layer: Layer, variant: Variant, experts: nn.Module, kept: Sequence[int], tokens: FitTokens,
    masked: Callable[[], AbstractContextManager[object]],
) -> Tensor:  # fmt: skip
    """The down projections [n, H, I] of the `kept` ones of `experts` with fewer neurons. `masked()` is a context in
    which the layer uses only these."""
    refit, width = variant.refit, variant.width
    assert width is not None
    target = "layer" if refit is None else refit.target
    wanted = wanted_of(stream, layer, variant.hidden, tokens, target=target, masked=masked)
    made = narrow_layer(layer.index, experts, wanted, kept, down_projections(experts, kept), width, refit)
    variant.neurons[layer.index] = made.neurons
    variant.narrowed.append(made.outcome)
    variant.fitted += [] if made.fitted is None else [made.fitted]
    return made.down
