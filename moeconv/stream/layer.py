"""One decoder layer of a stream, and the record of one forward pass through it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moeconv.errors import InputError
from moeconv.stream.finite import check_finite
from moeconv.stream.hooks import captured
from moeconv.stream.memory import release_memory

if TYPE_CHECKING:
    from moeconv.stream.layers import LayerStream


@dataclass(frozen=True, eq=False)
class Batch:
    """One forward pass of one layer over the windows `rows`: b windows of S tokens, T = b * S tokens in all.

    `inputs` and `outputs` [b, S, H] are the residual stream before and after the layer. `residual` [T, H] is the input
    of the norm before the FFN (or of the FFN, in families without such a norm). Where a family has several residual
    streams, the H of these three is the width of all. `ffn_input` and `ffn_output` [T, H] are the input and output of
    the FFN block, including a shared expert. `expert_input` and `expert_output` [T, D] are those of the routed experts
    alone, where D is not H in a family whose experts compute in a latent space; in a dense layer they are those of the
    FFN. Only of MoE layers: `router_logits` [T, E], `top_k_index` int64 [T, k], and
    `top_k_weights` [T, k], the weights that the model really gives its experts.
    """

    rows: slice
    inputs: Tensor
    outputs: Tensor
    residual: Tensor
    ffn_input: Tensor
    ffn_output: Tensor
    expert_input: Tensor
    expert_output: Tensor
    router_logits: Tensor | None = None
    top_k_index: Tensor | None = None
    top_k_weights: Tensor | None = None


@dataclass(eq=False)
class Layer:
    """A decoder layer with its weights loaded. `router` and `experts` are None in a dense layer.

    `norm` is the norm before the FFN, or the module before it that mixes several residual streams; None in families
    without one there. `experts(x [T, H], top_k_index [T, k], top_k_weights [T, k])` is the stock experts module:
    `experts(x, e, 1)` is the output of expert e. Where the weights multiply the inputs, it is called with the weighted
    tokens of every expert, [E * T, H].
    """

    index: int
    module: nn.Module
    norm: nn.Module | None
    ffn: nn.Module
    router: nn.Module | None
    experts: nn.Module | None
    _stream: LayerStream = field(repr=False)
    advanced: bool = False
    _halfway: bool = False

    def run(self, hidden: Tensor, rows: slice) -> Tensor:
        """The layer's output [b, S, H] for inputs [b, S, H] of the batch `rows` of the stream. Gradients are recorded
        if the caller has them enabled."""
        args, kwargs = self._stream.arguments(rows, self.index)
        out = self.module(self._stream.as_given(hidden), *args, **kwargs)
        return (out[0] if isinstance(out, tuple) else out).flatten(2)

    @property
    def expert_dimension(self) -> int:
        """The width D of what an expert reads and writes."""
        return self._stream.model.expert_dimension

    @property
    def top_k_on_input(self) -> int:
        """The number of experts per token of a router whose weights multiply the experts' inputs; 0 for all others."""
        model = self._stream.model
        return model.top_k if model.weighs_inputs else 0

    @property
    def biases(self) -> list[Tensor]:
        """The tensors [E] or [1, E] that the router adds to its scores for the choice. They share memory with the
        model."""
        state = self._stream.skeleton.module.state_dict(keep_vars=True)
        return [state[self._stream.skeleton.place(name)].detach() for name in self._stream.router_extras(self.index)]

    @property
    def scale(self) -> Tensor | None:
        """The factors [E] by which each expert's routing weight is multiplied; None in families without them."""
        family, skeleton = self._stream.model.family, self._stream.skeleton
        if not family.has("router.scale"):
            return None
        return skeleton.module.get_parameter(skeleton.place(family.name("router.scale", layer=self.index))).detach()

    def batches(self, *, advance: bool = True, hidden: Tensor | None = None) -> Iterator[Batch]:
        """Run the layer over all windows, batch by batch.

        With `advance`, the outputs become the inputs of the next layer as the batches are consumed. Such a pass is
        possible once and must be consumed to the end; a pass without `advance` can be repeated. With `hidden` [n, S,
        H], the inputs are read from there and (with `advance`) the outputs are written there, and the stream itself
        does not advance. Raises NotFiniteError if the layer computes NaN or infinity.
        """
        own = hidden is None
        if own and (self.advanced or self._halfway):
            raise ValueError(f"layer {self.index} has already been run, and its inputs are overwritten")
        self._halfway = advance if own else self._halfway
        flow = self._stream.hidden if hidden is None else hidden
        for rows in self._stream.rows():
            inputs = self._stream.batch(flow, rows).to(self._stream.device)
            parts = (self.norm, self.ffn, self.router, self.experts)
            with torch.no_grad(), captured(*parts, on_input=self.top_k_on_input) as seen:
                outputs = self.run(inputs, rows)
            check_finite(self._stream.model, outputs, layer=self.index)
            self._check_logits(seen.get("router_logits"))
            yield Batch(rows=rows, inputs=inputs, outputs=outputs, **seen)
            if advance:
                self._stream.batch(flow, rows).copy_(outputs)
            del (
                inputs,
                outputs,
                seen,
            )  # freed before the next batch, if the caller holds no reference
            if own and advance:
                self._stream.ran(rows)
        if own:
            self.advanced, self._halfway = advance, False

    def _check_logits(self, logits: Tensor | None) -> None:
        """Raises InputError if the router of the installed transformers does not give one logit per expert."""
        if logits is not None and logits.shape[-1] != self._stream.model.num_experts:
            raise InputError(
                f"the router of {self._stream.model.family.model_type} in the installed transformers gives "
                f"{logits.shape[-1]} numbers per token, not one for each of {self._stream.model.num_experts} experts",
                hint="Install a newer transformers: pip install -U transformers.",
            )

    def free(self) -> None:
        """Free the weights when all batches were run, before the next layer is requested."""
        self._stream.skeleton.empty(self.module)
        release_memory()

    def run_all(self) -> None:
        """Run all batches, and use nothing of them."""
        for batch in self.batches():
            del batch
