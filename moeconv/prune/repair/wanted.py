"""What the kept experts of a layer should compute, and on which tokens: the inputs of refits and of width cuts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from moeconv.errors import InputError
from moeconv.prune.repair.refit import Routes
from moeconv.stream.layer import Batch, Layer
from moeconv.stream.layers import LayerStream
from moeconv.stream.one_ffn import every_token
from moeconv.tensors import all_finite
from moeconv.world import all_agree, summed

_SAME = 0.02  # relative difference below which a layer counts as adding its FFN to the residual stream


@dataclass(frozen=True, eq=False)
class FitTokens:
    """The tokens of a fit: `windows` bool [n] are those it uses. `held` bool [n, S] are the held-out tokens of these,
    on which the result is only compared."""

    windows: Tensor
    held: Tensor


@dataclass(frozen=True, eq=False)
class Wanted:
    """The routed tokens of a pruned layer, and for each the wanted output minus the present one: `routes` and `missing`
    [t, H] for the fit, `held_routes` and `held_missing` those that are held out. `held_square` is the squared norm of
    the layer's output on the latter. Of several processes, each has its tokens, and the numbers are of all of them."""

    routes: Routes
    missing: Tensor
    held_routes: Routes
    held_missing: Tensor
    held_square: float

    def tokens_per_expert(self, experts: int) -> float:
        """The routed tokens of the fit per expert, of that many kept experts."""
        return float(summed((self.routes.weights != 0).sum())) / experts

    def relative(self, squares: Tensor) -> float:
        """The root of the sum of squared errors, relative to the layer's output."""
        return (float(squares.sum()) / self.held_square) ** 0.5 if self.held_square else 0.0


def wanted_of(
    stream: LayerStream, layer: Layer, hidden: Tensor, tokens: FitTokens, *, target: str,
    masked: Callable[[], AbstractContextManager[object]],
) -> Wanted:  # fmt: skip
    """Run a pruned layer on `hidden` [n, S, H], the activations of the pruned model. `masked()` is a context in which
    its router chooses only kept experts.

    With `target` "stream", the wanted output is the one that gives the residual stream of the unpruned model, so
    that each layer also corrects the errors of the layers before it. If the family does not simply add the experts'
    outputs to the stream, it is the output of the whole FFN, or of the experts alone (in their latent space, or before
    a norm), on the same inputs. Raises InputError for NaN and infinite values.
    """
    routes: list[Routes] = []
    wanted: list[Tensor] = []
    rows: list[Tensor] = []
    held_rows: list[Tensor] = []
    output_square = 0.0
    additive, family = False, stream.model.family
    alone = layer.experts is not None and (layer.expert_dimension != stream.model.hidden_size or family.experts.normed)
    one_stream = stream.model.residual_size == stream.model.hidden_size

    def made(batch: Batch) -> Tensor:
        return batch.expert_output if alone else batch.ffn_output

    with masked():
        for batch in layer.batches(advance=False, hidden=hidden):
            index, given = batch.top_k_index, batch.top_k_weights
            if index is None or given is None:
                index, given = every_token(batch.expert_input)
            if not wanted and one_stream:
                added, after = batch.residual + batch.ffn_output, batch.outputs.flatten(0, 1)
                alike = bool((added - after).norm() <= _SAME * batch.ffn_output.norm())
                additive = all_agree(alike) and not alone
            of = tokens.windows[batch.rows].repeat_interleave(batch.inputs.shape[1]).to(batch.outputs.device)
            held_here = tokens.held[batch.rows].flatten().to(of.device)
            rows.append(of)
            held_rows.append(held_here[of])
            output_square += float(made(batch)[held_here].double().square().sum())
            weights = given[of] * (stream.model.routed_share if batch.top_k_index is not None else 1.0)
            routes.append(Routes(batch.expert_input[of], index[of], weights))
            if target == "stream" and additive:
                after = stream.hidden[batch.rows].to(batch.outputs.device)
                wanted.append((after - batch.outputs).flatten(0, 1))
            else:
                wanted.append(-made(batch))
    if not (target == "stream" and additive):
        for i, batch in enumerate(layer.batches(advance=False, hidden=hidden)):
            wanted[i] = wanted[i] + made(batch)
    missing = torch.cat([wanted[i][of] for i, of in enumerate(rows)])
    wanted.clear()  # every copy of all activations is freed before the next one is made
    if not all_finite(missing):
        raise InputError(f"layer {layer.index} computes NaN or infinite values", hint="The checkpoint is damaged.")
    held = torch.cat(held_rows)
    fit_missing, held_missing = missing[~held], missing[held]
    del missing
    whole = Routes(*(torch.cat([getattr(r, name) for r in routes]) for name in ("hidden", "index", "weights")))
    routes.clear()
    return Wanted(whole.where(~held), fit_missing, whole.where(held), held_missing, _summed(output_square))


def _summed(number: float) -> float:
    return float(summed(torch.tensor(number, dtype=torch.float64)))
