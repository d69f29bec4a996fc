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
from moeconv.errors import InputError
from moeconv.prune.repair.heal import Heal, Healed, HealOutcome, LayerData, dtypes_of, heal_layer, kept_alone
from moeconv.prune.repair.refit import Refit, RefitOutcome, Routes, held_out_errors, refit_layer, tokens_needed
from moeconv.stream.experts import down_projections, with_down
from moeconv.stream.layer import Batch, Layer
from moeconv.stream.layers import LayerStream
from moeconv.stream.masking import check_routed, routed_to
from moeconv.stream.memory import allocate

_SAME = 0.02  # relative difference below which a layer counts as adding its FFN to the residual stream

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
    the new down projections of each layer. `top_k` is the number of experts per token, instead of the model's own.
    With `heal`, the kept experts and the router of each layer are trained after the refit; `healed` records the
    results, and `on_healed` is called with every layer. After the pass, `hidden` [n, S, H] are the final activations of
    the variant, and `keep` has an entry for every layer.
    """

    keep: dict[int, Sequence[int]] = field(default_factory=dict)
    choose: Choose | None = None
    refit: Refit | None = None
    top_k: int | None = None
    replace: Mapping[int, Downs] = field(default_factory=dict)
    scale: Mapping[int, float] = field(default_factory=dict)
    on_layer: OnLayer | None = None
    heal: Heal | None = None
    healed: list[HealOutcome] = field(default_factory=list)
    on_healed: OnHealed | None = None
    fitted: list[RefitOutcome] = field(default_factory=list)
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
    tokens = _Tokens(torch.from_numpy(seen), torch.from_numpy(held))
    for layer in stream.layers():
        for _ in layer.batches():
            pass
        for variant in variants:
            if layer.experts is None:
                for _ in layer.batches(hidden=variant.hidden):
                    pass
            else:
                _pass_layer(stream, layer, variant, tokens)


@dataclass(frozen=True, eq=False)
class _Tokens:
    """The tokens of a refit: `windows` bool [n] are those it uses. `held` bool [n, S] are the held-out tokens of these,
    on which the result is only compared."""

    windows: Tensor
    held: Tensor


def _pass_layer(stream: LayerStream, layer: Layer, variant: Variant, tokens: _Tokens) -> None:
    if variant.choose is not None:
        variant.keep[layer.index] = list(variant.choose(layer, variant.hidden))
    kept = variant.keep.get(layer.index, range(stream.model.num_experts))
    kept, replaced = sorted(kept), variant.replace.get(layer.index)
    if layer.index in variant.scale and layer.experts is not None:
        replaced = kept, down_projections(layer.experts, kept) * variant.scale[layer.index]
    if variant.refit is not None:
        replaced = kept, _refitted(stream, layer, variant, kept, tokens)
    if variant.on_layer is not None and replaced is not None:
        variant.on_layer(layer.index, *replaced)
    with masked(stream, layer, kept, top_k=variant.top_k, replaced=replaced) as stack:
        if variant.heal is not None:
            part = stack.enter_context(kept_alone(layer, kept, num_experts=stream.model.num_experts))
            _heal(stream, layer, variant, part, tokens)
        for batch in layer.batches(hidden=variant.hidden):
            assert batch.top_k_index is not None and batch.top_k_weights is not None
            check_routed(batch.top_k_index, batch.top_k_weights, kept, top_k=variant.top_k, layer=layer.index)


def _heal(stream: LayerStream, layer: Layer, variant: Variant, part: nn.Module, tokens: _Tokens) -> None:
    """Train a pruned layer, and report the result."""
    assert variant.heal is not None and variant.on_healed is not None
    training = tokens.windows[:, None] & ~tokens.held
    data = LayerData(variant.hidden, stream.hidden, training, tokens.held)
    with torch.enable_grad():
        made = heal_layer(stream, layer, part, data, variant.heal, dtypes_of(stream.model, layer.index))
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


def _refitted(stream: LayerStream, layer: Layer, variant: Variant, kept: Sequence[int], tokens: _Tokens) -> Tensor:
    """The new down projections [n, H, I] of the kept experts. The target is the residual stream of the unpruned model
    after the layer, so that each layer also corrects the errors of the layers before it. If the family does not simply
    add the experts' outputs to the stream, the target is the output of the whole FFN, or of the experts alone (in their
    latent space, or before a norm), on the same inputs. Returns the old down projections if the new ones are not
    clearly better on the held-out tokens, or if there are too few tokens for a fit."""
    assert variant.refit is not None and layer.experts is not None
    routes: list[Routes] = []
    wanted: list[Tensor] = []
    rows: list[Tensor] = []
    held_rows: list[Tensor] = []
    output_square = 0.0  # squared norm of the pruned FFN's output on held-out tokens
    additive, family = False, stream.model.family
    alone = layer.expert_dimension != stream.model.hidden_size or family.experts.normed
    one_stream = stream.model.residual_size == stream.model.hidden_size

    def made(batch: Batch) -> Tensor:
        return batch.expert_output if alone else batch.ffn_output

    with masked(stream, layer, kept, top_k=variant.top_k):
        for batch in layer.batches(advance=False, hidden=variant.hidden):
            assert batch.top_k_index is not None and batch.top_k_weights is not None
            if not wanted and one_stream:
                added, after = batch.residual + batch.ffn_output, batch.outputs.flatten(0, 1)
                additive = bool((added - after).norm() <= _SAME * batch.ffn_output.norm()) and not alone
            of = tokens.windows[batch.rows].repeat_interleave(batch.inputs.shape[1]).to(batch.outputs.device)
            held_here = tokens.held[batch.rows].flatten().to(of.device)
            rows.append(of)
            held_rows.append(held_here[of])
            output_square += float(made(batch)[held_here].double().square().sum())
            weights = batch.top_k_weights[of] * stream.model.routed_share
            routes.append(Routes(batch.expert_input[of], batch.top_k_index[of], weights))
            if variant.refit.target == "stream" and additive:
                after = stream.hidden[batch.rows].to(batch.outputs.device)
                wanted.append((after - batch.outputs).flatten(0, 1))
            else:
                wanted.append(-made(batch))
    if not (variant.refit.target == "stream" and additive):
        for i, batch in enumerate(layer.batches(advance=False, hidden=variant.hidden)):
            wanted[i] = wanted[i] + made(batch)
    missing = torch.cat([wanted[i][of] for i, of in enumerate(rows)])
    wanted.clear()  # every copy of all activations is freed before the next one is made
    if not bool(torch.isfinite(missing).all()):
        raise InputError(f"layer {layer.index} computes NaN or infinite values", hint="The checkpoint is damaged.")
    held = torch.cat(held_rows)
    fit_missing, held_missing = missing[~held], missing[held]
    del missing
    whole = Routes(*(torch.cat([getattr(r, name) for r in routes]) for name in ("hidden", "index", "weights")))
    routes.clear()
    fit_routes, held_routes = whole.where(~held), whole.where(held)
    del whole
    before = down_projections(layer.experts, kept)
    fitted = refit_layer(layer.experts, fit_routes, fit_missing, kept, before, variant.refit)
    old, new = held_out_errors(layer.experts, held_routes, held_missing, kept, fitted.float() - before.float())
    available, needed = float((fit_routes.weights != 0).sum()) / len(kept), tokens_needed(before)
    better = available >= needed and clearly_less(new.cpu(), old.cpu())
    was, now = ((float(squares.sum()) / output_square) ** 0.5 if output_square else 0.0 for squares in (old, new))
    variant.fitted.append(RefitOutcome(layer.index, was, now, available, needed, kept=better))
    return fitted if better else before
