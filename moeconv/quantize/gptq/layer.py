"""The codes of one layer's experts, chosen by data, and their error on held-out tokens against round-to-nearest.

The codes of gate and up are chosen first, by what the expert reads. The codes of down follow, by the hidden activations
behind the quantized gate and up, so that down makes up for a part of their error.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from moeconv.contract import CodesLayer
from moeconv.data import heldout
from moeconv.errors import InputError
from moeconv.families.model import Model
from moeconv.plan.plan import Item
from moeconv.quantize.gptq.grids import nearest_on_disk, on_disk
from moeconv.quantize.gptq.groups import Group, by_matrix, grouped, role_of, weight_name
from moeconv.quantize.gptq.hidden import hidden_activations
from moeconv.quantize.gptq.levels import Coded, round_to_nearest
from moeconv.quantize.gptq.moments import POOLED, Shown, moments, shown
from moeconv.quantize.gptq.solve import damped, gptq, retarget
from moeconv.randomness import generator
from moeconv.stream.layer import Layer
from moeconv.stream.layers import LayerStream
from moeconv.stream.memory import allocate
from moeconv.tensors import decode_weight, packed_source

_TOKENS_PER_COLUMN = 4  # of what a layer's experts read: with fewer, codes fit the text and not the model
Put = Callable[[Mapping[str, Tensor]], None]


@dataclass(frozen=True, eq=False)
class ExpertInputs:
    """What a layer's experts read: inputs [T, H]; the router's choice, index int64 and weights [T, k]; `held` bool [T],
    the held-out tokens; `pool` int64 [P], the tokens that shape the codes of every expert; `shown`, per expert, the
    tokens that shape its codes."""

    inputs: Tensor
    index: Tensor
    weights: Tensor
    held: Tensor
    pool: Tensor
    shown: Mapping[int, Shown]


@dataclass(eq=False)
class _Weights:
    """A layer's weights by name in the view: `rounded` to the nearest level, and `chosen` by data (the unquantized
    weight until its codes are chosen). `packed` is what is written of the chosen ones; it is small beside the
    weights."""

    rounded: dict[str, Tensor]
    chosen: dict[str, Tensor]
    packed: list[Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class LayerCodes:
    """The work on one layer. `items` are the planned packings of its experts' weights. `view` is the model that these
    weights have their names in, `limit` the bytes of work memory per group of experts; `workers` code several groups at
    the same time."""

    model: Model
    view: Model
    stream: LayerStream
    layer: Layer
    items: Sequence[Item]
    damping: float
    seed: int
    limit: int
    workers: ThreadPoolExecutor

    def run(self, put: Put) -> CodesLayer:
        """Choose the codes of all experts and pass them to `put`; then compute the layer with them, so that the next
        layer reads what the quantized model gives it. The layer keeps round-to-nearest where the chosen codes are not
        clearly better on held-out tokens, and where the tokens are too few to choose codes by.

        Raises InputError for experts without a `down_proj`, and for weights that are not finite.
        """
        experts = self.layer.experts
        assert experts is not None
        if not hasattr(experts, "down_proj"):
            raise InputError(
                f"--method gptq needs the experts' down_proj, and {type(experts).__name__} of transformers has none",
                hint="Use --method rtn or mse.",
            )
        seen = self._expert_inputs()
        original = copy.deepcopy(experts)
        found = _Weights({}, {}, [])
        group = partial(grouped, self.view, self.items, limit=self.limit, on_cpu=self.stream.device.type == "cpu")
        gates = group(down=False)
        downs = group(down=True, tokens={e: len(s.rows) + len(seen.pool) for e, s in seen.shown.items()})
        self._each(gates, partial(self._code_gate_up, seen, self._pooled(seen)), found)
        self._each(downs, self._round, found)
        wanted = self._output(seen, seen.held)
        self._fill(found.rounded)
        nearest = _squares(self._output(seen, seen.held), wanted)
        self._fill(found.chosen)
        self._each(downs, partial(self._code_down, seen, original, dict(found.chosen)), found)
        del original
        self._fill(found.chosen)
        chosen = _squares(self._output(seen, seen.held), wanted)
        counts = [len(s.rows) for s in seen.shown.values()]
        tokens, needed = sum(counts) / len(counts), self._tokens_needed()
        kept = tokens >= needed and heldout.clearly_less(chosen.cpu(), nearest.cpu())
        if not kept:
            self._fill(found.rounded)
        for parts in found.packed if kept else (nearest_on_disk(item, self.model.checkpoint) for item in self.items):
            put(parts)
        for _ in self.layer.batches():  # computes what the next layer reads
            pass
        reached, baseline = _relative(chosen, wanted), _relative(nearest, wanted)
        return {
            "layer": self.layer.index,
            "output_rms": reached if kept else baseline,
            "output_rms_rtn": baseline,
            "output_rms_gptq": reached,
            "kept": kept,
            "fewest_tokens": min(counts),
            "tokens_per_expert": tokens,
            "tokens_needed": needed,
        }

    def _tokens_needed(self) -> int:
        """Tokens per expert at which the layer's own tokens fill the second moment that its experts share."""
        share = self.model.top_k / self.model.num_experts
        return math.ceil(_TOKENS_PER_COLUMN * self.model.hidden_size * share)

    def _each(self, groups: Sequence[Group], code: Callable[[Group], _Weights], found: _Weights) -> None:
        """Code the groups, several at a time, and add the results to `found` in the order of the groups."""
        for made in self.workers.map(torch.no_grad()(code), groups):
            found.rounded |= made.rounded
            found.chosen |= made.chosen
            found.packed += made.packed

    # -- codes -------------------------------------------------------------------------------------------------------

    def _code_gate_up(self, seen: ExpertInputs, pooled: Tensor, group: Group) -> _Weights:
        """Codes of the matrices that read the expert's input."""
        own = [seen.shown[e] for e in group.experts]
        rows, weights = torch.cat([s.rows for s in own]), torch.cat([s.weights for s in own])

        def take(at: Tensor) -> tuple[Tensor, Tensor]:
            x = seen.inputs[rows[at.cpu()]].to(self.stream.device)
            return x, x

        total = moments(take, weights.to(self.stream.device), [len(s.rows) for s in own])
        rest = torch.tensor([s.rest for s in own], dtype=torch.float64, device=total.device)
        hessian = damped(total.add_(rest[:, None, None] * pooled), self.damping)
        weight = self._stacked(group)
        rounded = round_to_nearest(weight, group.grid, group=group.size).decoded()
        coded = gptq(weight, hessian, group.grid, group=group.size)
        return self._made(group, coded, rounded)

    def _round(self, group: Group) -> _Weights:
        """The nearest codes alone. The unquantized weights stand for the chosen ones, which come later."""
        weight = self._stacked(group)
        rounded = round_to_nearest(weight, group.grid, group=group.size).decoded()
        return _Weights(by_matrix(group, rounded), by_matrix(group, weight), [])

    def _code_down(
        self, seen: ExpertInputs, original: nn.Module, weights: Mapping[str, Tensor], group: Group
    ) -> _Weights:
        """Codes of down projections, which make up for a part of the error of the gate and up in front of them."""
        own = [seen.shown[e] for e in group.experts]
        counts = [len(s.rows) + len(seen.pool) for s in own]
        rows = torch.cat([part for s in own for part in (s.rows, seen.pool)])
        parts = [part for s in own for part in (s.weights, torch.full((len(seen.pool),), s.rest))]
        share = torch.cat(parts).to(self.stream.device)
        expert = torch.tensor(group.experts).repeat_interleave(torch.tensor(counts))
        moment, gap = self._hidden_moments(original, seen.inputs, rows, expert, share, counts)
        mean = moment.diagonal(dim1=1, dim2=2).mean(-1)
        gap /= torch.where(mean > 0, mean, torch.inf)[:, None, None]
        hessian = damped(moment, self.damping)
        weight = torch.stack([torch.cat([weights[weight_name(item)] for item in items]) for items in group.items])
        coded = gptq(retarget(weight, gap, hessian), hessian, group.grid, group=group.size)
        return self._made(group, coded, None)

    def _hidden_moments(
        self, original: nn.Module, inputs: Tensor, rows: Tensor, expert: Tensor, share: Tensor, counts: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """(second moment of the hidden activations, moment of their error with them), both float64 [E, I, I]. The
        error is what the quantized gate and up lack against the `original` experts."""
        assert self.layer.experts is not None
        given = hidden_activations(self.layer.experts, inputs, rows, expert, self.stream.device)
        lost = hidden_activations(original, inputs, rows, expert, self.stream.device).sub_(given)
        moment = moments(lambda at: (given[at], given[at]), share, counts)
        return moment, moments(lambda at: (lost[at], given[at]), share, counts)

    def _made(self, group: Group, coded: Coded, rounded: Tensor | None) -> _Weights:
        """The coded weights of a group by matrix, with their tensors as on disk."""
        apart = zip(by_matrix(group, coded.levels).values(), by_matrix(group, coded.scales).values(), strict=True)
        items = (item for items in group.items for item in items)
        packed: list[Mapping[str, Tensor]] = [
            on_disk(item, Coded(*of_one)) for item, of_one in zip(items, apart, strict=True)
        ]
        return _Weights({} if rounded is None else by_matrix(group, rounded), by_matrix(group, coded.decoded()), packed)

    def _stacked(self, group: Group) -> Tensor:
        """The weights of a group, those of one expert stacked along the rows: [E, out, in]."""
        return torch.stack([torch.cat([self._weight(item) for item in items]) for items in group.items])

    def _pooled(self, seen: ExpertInputs) -> Tensor:
        """The second moment of the pool, float64 [H, H]."""
        x = seen.inputs[seen.pool].to(self.stream.device)
        return moments(lambda at: (x[at], x[at]), torch.ones(len(x), device=x.device), [len(x)])[0]

    # -- the model --------------------------------------------------------------------------------------------------

    def _expert_inputs(self) -> ExpertInputs:
        """Computes the layer once, unquantized, and keeps what its experts read."""
        tokens, length = self.stream.windows.numel(), self.stream.windows.shape[1]
        inputs = allocate((tokens, self.model.hidden_size), torch.float32, self.stream.max_memory)
        index, weights = [], []
        for batch in self.layer.batches(advance=False):
            assert batch.top_k_index is not None and batch.top_k_weights is not None
            inputs[batch.rows.start * length : batch.rows.stop * length].copy_(batch.ffn_input)
            index.append(batch.top_k_index.cpu())
            weights.append(batch.top_k_weights.float().cpu())
        held = torch.from_numpy(heldout.held_out(*self.stream.windows.shape)).flatten()
        chosen, scores, pool = torch.cat(index), torch.cat(weights), self._pool(held)
        experts = sorted({int(role_of(self.view, item).expert or 0) for item in self.items})
        seen = shown(chosen, scores, ~held, experts=experts, pooled=len(pool))
        return ExpertInputs(inputs, chosen, scores, held, pool, seen)

    def _pool(self, held: Tensor) -> Tensor:
        """Positions of the tokens that shape the codes of every expert, sorted."""
        free = (~held).nonzero().flatten()
        draw = generator((self.seed, "codes", self.layer.index))
        count = min(POOLED, len(free))
        return free[torch.from_numpy(draw.choice(len(free), size=count, replace=False, shuffle=False)).sort().values]

    def _weight(self, item: Item) -> Tensor:
        """The weight [out, in] that an item packs, float32."""
        weight = packed_source(self.model.checkpoint, item).float()
        if not bool(torch.isfinite(weight).all()):
            raise InputError(
                f"tensor {item.inputs[0].tensor!r} holds NaN or infinite values",
                hint="Repair or replace the source checkpoint.",
            )
        return weight.to(self.stream.device)

    def _fill(self, weights: Mapping[str, Tensor]) -> None:
        """Put weights, by their names in the view, into the layer's experts; other tensors come from the source."""
        experts, skeleton = self.layer.experts, self.stream.skeleton
        assert experts is not None
        names = [n for n, role in self.view.roles.items() if (role.layer, role.group) == (self.layer.index, "expert")]
        skeleton.empty(experts)
        filled = {name: weights[name] if name in weights else decode_weight(self.model, name) for name in names}
        skeleton.fill(filled, under=skeleton.name_of(experts) + ".")

    def _output(self, seen: ExpertInputs, rows: Tensor) -> Tensor:
        """The sum of the experts' weighted outputs for the tokens where `rows` bool [T] is true: [n, H]."""
        assert self.layer.experts is not None
        made, device = [], self.stream.device
        for part in rows.nonzero().flatten().split(4096):
            given = seen.inputs[part].to(device), seen.index[part].to(device), seen.weights[part].to(device)
            made.append(self.layer.experts(*given))
        return torch.cat(made)


def _squares(made: Tensor, wanted: Tensor) -> Tensor:
    """The squared error of each token, float64 [n]."""
    return (made.double() - wanted.double()).square().sum(1)


def _relative(squares: Tensor, wanted: Tensor) -> float:
    """sqrt(sum of squared errors / sum wanted^2)."""
    norm = float(wanted.double().square().sum())
    return (float(squares.sum()) / norm) ** 0.5 if norm else 0.0
