"""Chooses the codes of one layer's experts by data, and compares their error on held-out tokens with round-to-nearest.

The codes of gate and up are chosen first, by the inputs of the expert. The codes of down follow, by the hidden
activations that the quantized gate and up compute, so that down corrects a part of their error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moeconv.contract import CodesLayer
from moeconv.data import heldout
from moeconv.families.model import Model
from moeconv.plan.plan import Item
from moeconv.quantize.gptq.experts import LayerExperts, check_finite, squared_errors, squared_norms
from moeconv.quantize.gptq.grids import nearest_on_disk, on_disk
from moeconv.quantize.gptq.groups import Group, by_matrix, grouped, role_of
from moeconv.quantize.gptq.hidden import hidden_activations
from moeconv.quantize.gptq.levels import Coded, round_to_nearest
from moeconv.quantize.gptq.moments import ExpertTokens, expert_tokens, moments
from moeconv.quantize.gptq.need import OUTPUT_ROWS, POOLED
from moeconv.quantize.gptq.solve import damped, gptq, retarget
from moeconv.randomness import generator
from moeconv.stream.layer import Layer
from moeconv.stream.layers import LayerStream
from moeconv.stream.memory import allocate
from moeconv.tensors import packed_source

_TOKENS_PER_COLUMN = 4  # per input column of the experts: with fewer, the codes follow the text and do not generalise
Put = Callable[[Mapping[str, Tensor]], None]


@dataclass(frozen=True, eq=False)
class ExpertInputs:
    """The inputs of a layer's experts: inputs [T, H]; the router's choice, index int64 and weights [T, k]; `held` bool
    [T], the held-out tokens; `pool` int64 [P], the tokens that are used for the codes of every expert; `tokens`, per
    expert, the tokens that are used for its codes."""

    inputs: Tensor
    index: Tensor
    weights: Tensor
    held: Tensor
    pool: Tensor
    tokens: Mapping[int, ExpertTokens]

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of the experts module."""
        return self.inputs, self.index, self.weights


@dataclass(frozen=True, eq=False)
class _Chosen:
    """The decoded weights for the chosen codes, by name in the view. `packed` are the tensors to write, which are small
    beside the weights."""

    weights: dict[str, Tensor]
    packed: list[Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class LayerCodes:
    """The work on one layer. `items` are the planned packings of the weights of its `experts`; the names of these
    weights are those of the model `view`. `limit` is the work memory in bytes per group of experts. `workers` code
    several groups at the same time."""

    model: Model
    view: Model
    stream: LayerStream
    layer: Layer
    experts: LayerExperts
    items: Sequence[Item]
    damping: float
    seed: int
    limit: int
    workers: ThreadPoolExecutor

    def run(self, put: Put) -> CodesLayer:
        """Choose the codes of all experts and pass them to `put`. Then compute the layer with the chosen weights, so
        that the next layer reads the activations of the quantized model. The layer keeps round-to-nearest if the chosen
        codes are not clearly better on held-out tokens. With too few tokens to choose codes by, it chooses none.

        Raises InputError for weights that are not finite.
        """
        seen = self._expert_inputs()
        held = seen.held.nonzero().flatten()
        wanted = allocate((len(held), self.model.expert_dimension), torch.float32, self.stream.max_memory)
        for part, made in zip(wanted.split(OUTPUT_ROWS), self.experts.outputs(seen.arguments, held), strict=True):
            part.copy_(made)
        group = partial(grouped, self.view, self.items, limit=self.limit, on_cpu=self.stream.device.type == "cpu")
        gates = group(down=False)
        downs = group(down=True, tokens={e: len(s.rows) + len(seen.pool) for e, s in seen.tokens.items()})
        self._round((*gates, *downs))
        nearest = self._squares(seen, held, wanted)
        counts = [len(s.rows) for s in seen.tokens.values()]
        tokens, needed = sum(counts) / len(counts), self._tokens_needed()
        packed: list[Mapping[str, Tensor]] = []
        reached, baseline, kept = None, _relative(nearest, wanted), False
        if tokens >= needed:
            packed = self._coded(seen, gates, downs)
            chosen = self._squares(seen, held, wanted)
            reached, kept = _relative(chosen, wanted), heldout.clearly_less(chosen, nearest)
            if not kept:
                self._round((*gates, *downs))
        for parts in packed if kept else (nearest_on_disk(item, self.model.checkpoint) for item in self.items):
            put(parts)
        for _ in self.layer.batches():  # computes the inputs of the next layer
            pass
        return {
            "layer": self.layer.index,
            "output_rms": reached if kept and reached is not None else baseline,
            "output_rms_rtn": baseline,
            "output_rms_gptq": reached,
            "kept": kept,
            "fewest_tokens": min(counts),
            "tokens_per_expert": tokens,
            "tokens_needed": needed,
        }

    def _coded(self, seen: ExpertInputs, gates: Sequence[Group], downs: Sequence[Group]) -> list[Mapping[str, Tensor]]:
        """Choose the codes of all experts and put the resulting weights into them. Returns the tensors to write."""
        packed = self._each(gates, partial(self._code_gate_up, seen, self._pooled(seen)))
        return packed + self._each(downs, partial(self._code_down, seen))

    def _tokens_needed(self) -> int:
        """The number of tokens per expert that are needed to choose codes. The experts share the second moment of the
        layer's tokens, so an expert needs only its share of them."""
        share = self.model.top_k / self.model.num_experts
        return math.ceil(_TOKENS_PER_COLUMN * self.model.expert_dimension * share)

    def _each(self, groups: Sequence[Group], code: Callable[[Group], _Chosen]) -> list[Mapping[str, Tensor]]:
        """Code the groups, several at a time, and put the resulting weights into the experts in the order of the
        groups. Returns the tensors to write."""
        packed: list[Mapping[str, Tensor]] = []
        for made in self.workers.map(torch.no_grad()(code), groups):
            self.experts.put(made.weights)
            packed += made.packed
        return packed

    def _round(self, groups: Sequence[Group]) -> None:
        """Put the weights of round-to-nearest into the experts, group by group."""
        for group in groups:
            coded = round_to_nearest(self._stacked(group), group.grid, group=group.size)
            self.experts.put(by_matrix(group, coded.decoded()))

    def _squares(self, seen: ExpertInputs, rows: Tensor, wanted: Tensor) -> Tensor:
        """The squared error of the experts' outputs against `wanted` for each of the tokens `rows`: float64 [n]."""
        made = zip(self.experts.outputs(seen.arguments, rows), wanted.split(OUTPUT_ROWS), strict=True)
        return torch.cat([squared_errors(one, part.to(one.device)).cpu() for one, part in made])

    # -- codes -------------------------------------------------------------------------------------------------------

    def _code_gate_up(self, seen: ExpertInputs, pooled: Tensor, group: Group) -> _Chosen:
        """The codes of the matrices that read the input of the expert."""
        own = [seen.tokens[e] for e in group.experts]
        rows, weights = torch.cat([s.rows for s in own]), torch.cat([s.weights for s in own])

        def take(at: Tensor) -> tuple[Tensor, Tensor]:
            x = seen.inputs[rows[at.cpu()]].to(self.stream.device)
            return x, x

        hessian = self._input_hessian(take, weights.to(self.stream.device), own, pooled)
        return self._made(group, gptq(self._stacked(group), hessian, group.grid, group=group.size))

    def _input_hessian(
        self,
        take: Callable[[Tensor], tuple[Tensor, Tensor]],
        weights: Tensor,
        own: Sequence[ExpertTokens],
        pooled: Tensor,
    ) -> Tensor:
        """The damped second moments of the experts' inputs, including the share of the pool: float64 [E, H, H]."""
        total = moments(take, weights, [len(s.rows) for s in own])
        rest = torch.tensor([s.rest for s in own], dtype=total.dtype, device=total.device)
        total.flatten(1).addr_(rest, pooled.flatten())
        return damped(total, self.damping)

    def _code_down(self, seen: ExpertInputs, group: Group) -> _Chosen:
        """The codes of the down projections, which correct a part of the error of gate and up."""
        hessian, gap = self._hidden_hessian(seen, group)
        weight = retarget(self._stacked(group), gap, hessian)
        del gap
        return self._made(group, gptq(weight, hessian, group.grid, group=group.size))

    def _hidden_hessian(self, seen: ExpertInputs, group: Group) -> tuple[Tensor, Tensor]:
        """(damped second moment of the hidden activations, moment of their error with them in the same units), both
        float64 [E, I, I]. The error is the difference between the hidden activations of the source and those of the
        quantized gate and up."""
        own, device = [seen.tokens[e] for e in group.experts], self.stream.device
        counts = torch.tensor([len(s.rows) + len(seen.pool) for s in own])
        rows = torch.cat([part for s in own for part in (s.rows, seen.pool)])
        parts = [part for s in own for part in (s.weights, torch.full((len(seen.pool),), s.rest))]
        share = torch.cat(parts).to(device)
        expert = torch.tensor(group.experts).repeat_interleave(counts)
        given = hidden_activations(self.experts.module, seen.inputs, rows, expert, device)
        expert = torch.arange(len(own)).repeat_interleave(counts)
        source = hidden_activations(self.experts.source(group.experts), seen.inputs, rows, expert, device)
        gap = moments(_rows_of(source.sub_(given), given), share, counts.tolist())
        del source
        moment = moments(_rows_of(given, given), share, counts.tolist())
        mean = moment.diagonal(dim1=1, dim2=2).mean(-1)
        gap /= torch.where(mean > 0, mean, torch.inf)[:, None, None]
        return damped(moment, self.damping), gap

    def _made(self, group: Group, coded: Coded) -> _Chosen:
        """The coded weights of a group by matrix, with their tensors as on disk."""
        levels, scales = coded.levels.cpu(), coded.scales.cpu()
        apart = zip(by_matrix(group, levels).values(), by_matrix(group, scales).values(), strict=True)
        items = (item for items in group.items for item in items)
        packed: list[Mapping[str, Tensor]] = [
            on_disk(item, Coded(*of_one)) for item, of_one in zip(items, apart, strict=True)
        ]
        return _Chosen(by_matrix(group, coded.decoded()), packed)

    def _stacked(self, group: Group) -> Tensor:
        """The weights of a group in float32, those of one expert stacked along the rows: [E, out, in]. Raises
        InputError for values that are not finite."""
        items = [item for of_expert in group.items for item in of_expert]
        parts = [packed_source(self.model.checkpoint, item) for item in items]
        rows = torch.cat(parts).to(self.stream.device).float()
        if not bool(torch.isfinite(rows).all()):
            check_finite(items, parts)
        return rows.view(len(group.items), -1, rows.shape[1])

    def _pooled(self, seen: ExpertInputs) -> Tensor:
        """The second moment of the pool, float64 [H, H]."""
        x = seen.inputs[seen.pool].to(self.stream.device)
        return moments(lambda at: (x[at], x[at]), torch.ones(len(x), device=x.device), [len(x)])[0]

    # -- the model --------------------------------------------------------------------------------------------------

    def _expert_inputs(self) -> ExpertInputs:
        """Compute the layer once, unquantized, and return the inputs of its experts."""
        tokens, length = self.stream.windows.numel(), self.stream.windows.shape[1]
        inputs = allocate((tokens, self.model.expert_dimension), torch.float32, self.stream.max_memory)
        index, weights = [], []
        for batch in self.layer.batches(advance=False):
            assert batch.top_k_index is not None and batch.top_k_weights is not None
            inputs[batch.rows.start * length : batch.rows.stop * length].copy_(batch.expert_input)
            index.append(batch.top_k_index.cpu())
            weights.append(batch.top_k_weights.float().cpu())
        held = torch.from_numpy(heldout.held_out(*self.stream.windows.shape)).flatten()
        chosen, scores, pool = torch.cat(index), torch.cat(weights), self._pool(held)
        experts = sorted({int(role_of(self.view, item).expert or 0) for item in self.items})
        seen = expert_tokens(chosen, scores, ~held, experts=experts, pooled=len(pool))
        return ExpertInputs(inputs, chosen, scores, held, pool, seen)

    def _pool(self, held: Tensor) -> Tensor:
        """The positions of the tokens that are used for the codes of every expert, sorted."""
        free = (~held).nonzero().flatten()
        draw = generator((self.seed, "codes", self.layer.index))
        count = min(POOLED, len(free))
        return free[torch.from_numpy(draw.choice(len(free), size=count, replace=False, shuffle=False)).sort().values]


def _rows_of(left: Tensor, right: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A function that returns the rows of both at given positions, for `moments`."""
    return lambda at: (left[at], right[at])


def _relative(squares: Tensor, wanted: Tensor) -> float:
    """sqrt(sum of squared errors / sum wanted^2)."""
    norm = float(squared_norms(wanted).sum())
    return (float(squares.sum()) / norm) ** 0.5 if norm else 0.0
