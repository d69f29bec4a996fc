"""Measures the statistics of one MoE layer, summed in float64 while the layer runs; artifact.py lists them.

Expert outputs are measured on routed tokens only, in the forward pass itself: the stock experts module is called with
the weight 1 for every (token, expert) pair, and the outputs are then weighted and summed as the module itself does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from moeconv.calibrate.artifact import PER_SOURCE
from moeconv.calibrate.routing import router_entropy
from moeconv.calibrate.sample import Tokens, on_all_experts, projection, sample_fields
from moeconv.errors import InputError
from moeconv.families.rule import Rule, input_weights
from moeconv.randomness import generator
from moeconv.stream.experts import pair_outputs
from moeconv.stream.layer import Batch, Layer
from moeconv.stream.memory import release_memory
from moeconv.stream.stored import stored_in
from moeconv.world import summed

_ROWS = 256  # tokens widened to float64 at a time

OnPairs = Callable[[Tensor, Tensor, Tensor, Tensor], None]  # expert [n] in ascending order, token, slot, output [n, H]


@torch.no_grad()
def layer_statistics(
    layer: Layer, *, source: Tensor, num_sources: int, num_experts: int, seed: int, sample_tokens: int,
    mine: Tensor | None = None, rule: Rule | None = None, hidden: Tensor | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Run `layer` over the windows of the stream, and return its fields, summed over the processes.

    `source` int64 [n] is the data source of every window of the data; the stream has the windows `mine` (None: all).
    `rule` is the routing rule that the token sample is checked against. With `hidden` [n, S, H], the inputs are read
    from there, and neither they nor the stream advance. Raises InputError if the layer computes NaN or infinite values.
    """
    assert layer.experts is not None and layer.router is not None
    mine = torch.arange(len(source)) if mine is None else mine
    sums = _Sums(layer, source[mine], num_sources, num_experts)
    sample: list[tuple[Tensor, ...]] = []
    chosen: Tensor | None = None
    places, taken = torch.empty(0, dtype=torch.int64), 0
    with each_expert(layer.experts, sums.on_pairs, router=layer.router, on_input=layer.top_k_on_input):
        for batch in layer.batches(advance=hidden is None, hidden=hidden):
            length = batch.inputs.shape[1]
            if chosen is None:
                drawn = _sample(len(source) * length, sample_tokens, seed=seed, layer=layer.index)
                chosen, taken = _within(drawn, mine, length), len(drawn)
                places = torch.isin(drawn // length, mine).nonzero()[:, 0]
            start, stop = batch.rows.start * length, batch.rows.stop * length
            here = chosen[(chosen >= start) & (chosen < stop)] - start
            sample.append(_picked(batch, here.to(batch.ffn_input.device)))
            sums.add(batch)
            del batch  # freed before the next batch and the sample are computed
    fields = sums.fields()
    x, logits, index, weights, scale = (torch.cat(parts) for parts in zip(*sample))
    tokens = Tokens(x, logits, index, weights, scale, places, taken)
    del sample
    release_memory()  # the working memory of the batches, before that of the sample is allocated
    matrix = projection(x.shape[1], layer=layer.index)
    similar, outputs = on_all_experts(
        layer.experts, x, matrix, num_experts=num_experts, weights=_of_inputs(rule, logits) if rule else None
    )
    fields["output_cosine"] = np.clip(summed(similar).cpu().numpy() / max(1, taken), -1, 1)
    fields |= sample_fields(outputs, tokens, layer.biases, rule, scale=layer.scale)
    for name, values in fields.items():
        if not np.isfinite(values).all():
            raise InputError(
                f"layer {layer.index} computes NaN or infinite values ({name})",
                hint="The checkpoint is damaged, or its weights overflow in this dtype.",
            )
    return fields


def _picked(batch: Batch, at: Tensor) -> tuple[Tensor, ...]:
    """The tensors of `Tokens`, for the tokens `at` of a batch."""
    assert batch.router_logits is not None and batch.top_k_index is not None and batch.top_k_weights is not None
    scale = torch.linalg.vector_norm(batch.residual[at].double(), dim=-1)
    return batch.expert_input[at], batch.router_logits[at], batch.top_k_index[at], batch.top_k_weights[at], scale


def _of_inputs(rule: Rule, logits: Tensor) -> Tensor | None:
    """The factors [T, E] of every expert's input, where the weights multiply the inputs."""
    if not rule.on_input:
        return None
    return torch.from_numpy(input_weights(rule, logits.double().cpu().numpy())).to(logits.device, logits.dtype)


@contextmanager
def each_expert(
    experts: nn.Module, on_pairs: OnPairs, *, router: nn.Module | None = None, on_input: int = 0
) -> Iterator[None]:
    """Inside the block, `on_pairs` gets the output of every expert: the unweighted one, or that for the weighted input
    where the weights of the `router` multiply the inputs, `on_input` experts per token. The experts module returns the
    same as before."""
    index: list[Tensor] = []

    def on_router(_module: nn.Module, _arguments: object, out: tuple[Tensor, Tensor]) -> None:
        index[:] = [out[0].topk(on_input, dim=-1).indices]

    def forward_each(hidden: Tensor) -> Tensor:  # [E * T, H], each row multiplied by its weight
        (chosen,) = index
        expert, order = chosen.reshape(-1).sort(stable=True)
        token, slot = order // on_input, order % on_input
        place, total = expert * len(chosen) + token, torch.zeros_like(hidden)
        for rows, output in pair_outputs(experts, hidden, place, expert):
            on_pairs(expert[rows], token[rows], slot[rows], output)
            total[place[rows]] = output
        return total

    def forward(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        flat, k = hidden.reshape(-1, hidden.shape[-1]), top_k_index.shape[-1]  # some families pass [b, S, H]
        expert, order = top_k_index.reshape(-1).sort(stable=True)
        token, slot, weights = order // k, order % k, top_k_weights.reshape(-1)[order, None]
        total = torch.zeros_like(flat)
        for rows, output in pair_outputs(experts, flat, token, expert, dtype=top_k_weights.dtype):
            on_pairs(expert[rows], token[rows], slot[rows], output)
            total.index_add_(0, token[rows], (output * weights[rows]).to(total.dtype))
        return total.view(hidden.shape)

    assert router is not None or not on_input
    hooks = [router.register_forward_hook(on_router)] if router is not None and on_input else []
    experts.forward = forward_each if on_input else forward
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        del experts.forward
        if (stored := stored_in(experts)) is not None:
            stored.attach()


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    """The cosines [T] of the rows of two tensors [T, H], in float64, computed block by block."""
    pairs = zip(one.split(_ROWS), other.split(_ROWS))
    return torch.cat([torch.nn.functional.cosine_similarity(a.double(), b.double(), eps=1e-300) for a, b in pairs])


def row_cosine(rows: Tensor) -> np.ndarray:
    """The cosines [E, E] of every two rows of a tensor [E, H], in float64."""
    units = torch.nn.functional.normalize(rows.double(), dim=-1, eps=1e-300)
    return (units @ units.T).clamp(-1, 1).cpu().numpy()


def _sample(total: int, count: int, *, seed: int, layer: int) -> Tensor:
    """The sorted positions of `count` random tokens of `total` (all, if there are fewer): int64 [n]."""
    draw = generator((seed, "sample", layer))
    return torch.from_numpy(np.sort(draw.choice(total, size=min(count, total), replace=False, shuffle=False)))


def _within(tokens: Tensor, windows: Tensor, length: int) -> Tensor:
    """The sorted positions, counted within these `windows`, of those `tokens` of the data that are in them."""
    at = torch.full((int(max(windows.max(), tokens.max() // length)) + 1,), -1)
    at[windows] = torch.arange(len(windows))
    places = at[tokens // length]
    return (places * length + tokens % length)[places >= 0].sort().values


class _Sums:
    """The float64 sums of one layer, updated batch by batch."""

    def __init__(self, layer: Layer, source: Tensor, num_sources: int, num_experts: int) -> None:
        assert layer.router is not None
        self.router_weight = layer.router.get_parameter("weight")  # [E, H]
        self.layer, self.source, self.shape = layer, source, (num_sources, num_experts)
        self.per_source = {name: self._zeros(num_sources * num_experts) for name in PER_SOURCE}
        self.entropy, self.tokens = self._zeros(num_sources), self._zeros(num_sources)
        self.pairs, self.logits = self._zeros(num_experts, num_experts), self._zeros(num_experts)
        self.logit_products = self._zeros(num_experts, num_experts)
        self.out = self._zeros(num_experts, layer.expert_dimension)
        self.on_input = layer.top_k_on_input > 0
        self.norms: list[tuple[Tensor, Tensor, Tensor]] = []  # of the current batch: token, slot, ||f||

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.router_weight.device)

    def on_pairs(self, expert: Tensor, token: Tensor, slot: Tensor, output: Tensor) -> None:
        for rows in range(0, len(output), _ROWS):
            wide = output[rows : rows + _ROWS].double()
            here = slice(rows, rows + len(wide))
            self.norms.append((token[here], slot[here], torch.linalg.vector_norm(wide, dim=-1)))
            self.out.index_add_(0, expert[here], wide)

    def add(self, batch: Batch) -> None:
        index, logits = batch.top_k_index, batch.router_logits
        assert index is not None and logits is not None and batch.top_k_weights is not None
        sources, experts = self.shape
        g, norm = batch.top_k_weights.double(), torch.zeros(index.shape, dtype=torch.float64, device=index.device)
        for token, slot, values in self.norms:
            norm[token, slot] = values
        self.norms.clear()
        moved = 1 - _cosine(batch.residual, batch.outputs.flatten(0, 1))
        of_token = self.source[batch.rows].to(index.device).repeat_interleave(batch.inputs.shape[1])  # [T]
        key = (of_token[:, None] * experts + index).reshape(-1)
        product = norm if self.on_input else g * norm
        each = (torch.ones_like(g), g, g * g, norm, norm * norm, product, product * product, product * moved[:, None])
        for name, value in zip(PER_SOURCE, each):
            self.per_source[name].index_add_(0, key, value.reshape(-1))
        self.entropy.index_add_(0, of_token, router_entropy(logits))
        self.tokens += torch.bincount(of_token, minlength=sources)
        routed = torch.zeros(len(index), experts, dtype=torch.float64, device=index.device).scatter_(1, index, 1.0)
        self.pairs += routed.T @ routed
        self.logits += logits.sum(0, dtype=torch.float64)
        self.logit_products += logits.double().T @ logits.double()

    def fields(self) -> dict[str, np.ndarray]:
        whole = (self.entropy, self.tokens, self.pairs, self.logits, self.logit_products, self.out)
        for total in (*self.per_source.values(), *whole):
            summed(total)
        fields = {name: total.view(self.shape) for name, total in self.per_source.items()}
        count = fields["count"].sum(0).clamp(min=1)
        mean = self.out / count[:, None]
        fields["out_mean"] = mean.float()
        fields["out_var"] = (fields["norm_sq_sum"].sum(0) / count - mean.square().sum(1)).clamp(min=0)
        fields |= {"coactivation": self.pairs, "logit_sum": self.logits, "logit_product": self.logit_products}
        fields["logit_correlation"] = logit_correlation(self.logits, self.logit_products, self.tokens.sum())
        fields |= {"entropy_sum": self.entropy, "tokens": self.tokens}
        result = {name: value.cpu().numpy() for name, value in fields.items()}
        result["router_cosine"] = row_cosine(self.router_weight)
        return result


def logit_correlation(total: Tensor, products: Tensor, tokens: Tensor) -> Tensor:
    """The Pearson correlation [E, E] of router logits over tokens, from the sums of the logits [E] and of their
    products [E, E]. It is 0 for a constant logit, and 1 on the diagonal."""
    mean = total / tokens
    covariance = products / tokens - torch.outer(mean, mean)
    spread = covariance.diagonal().clamp(min=0).sqrt()
    scale = torch.outer(spread, spread)
    correlation = torch.where(scale > 0, covariance / scale, 0.0).clamp(-1, 1)
    return correlation.fill_diagonal_(1.0)
