"""What every method that chooses codes with data needs from one layer: the inputs of its experts, their weights in
groups, and the error of their outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from moeconv.data import heldout
from moeconv.families.model import Model
from moeconv.plan.kernels.pack.levels import Coded, round_to_nearest
from moeconv.plan.plan import Item
from moeconv.quantize.gptq.experts import LayerExperts, check_finite, squared_errors
from moeconv.quantize.gptq.grids import on_disk
from moeconv.quantize.gptq.groups import Group, by_matrix, grouped, role_of
from moeconv.quantize.gptq.moments import ExpertTokens, expert_tokens
from moeconv.quantize.gptq.need import OUTPUT_ROWS, POOLED
from moeconv.randomness import generator
from moeconv.stream.layer import Layer
from moeconv.stream.layers import LayerStream
from moeconv.stream.memory import allocate
from moeconv.stream.share import copied_from, joined
from moeconv.tensors import all_finite, packed_source
from moeconv.world import current, summed

Parts = Mapping[str, Tensor]  # tensors to write, by name
R = TypeVar("R")


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
class Target:
    """The outputs [n, H] of the unquantized experts for the tokens `rows` int64 [n]."""

    rows: Tensor
    outputs: Tensor


@dataclass(frozen=True, eq=False)
class Made:
    """The decoded weights of a group for the chosen codes, by name in the view. `packed` are the tensors to write,
    which are small compared with the weights."""

    weights: Mapping[str, Tensor]
    packed: Sequence[Parts]


@dataclass(frozen=True, eq=False)
class Settings:
    """What the user sets: `damping` of the second moments, whether GPTQ chooses the columns of the largest inputs first
    (`ordered`), and the seed of the tokens that all experts share."""

    damping: float = 0.01
    ordered: bool = True
    seed: int = 0


@dataclass(frozen=True, eq=False)
class LayerWork:
    """The work on one layer. `items` are the planned packings of the weights of its `experts`, `beside` the planned
    items of what else reads the experts' input, and of the norm that writes it; the names of all are those of the model
    `view`. `limit` is the work memory in bytes per group of experts. `workers` code several groups at the same time.

    Of several processes, each has its share of the windows, and codes every n-th group. All of them have the inputs
    of all windows and the weights of all experts."""

    model: Model
    view: Model
    stream: LayerStream
    layer: Layer
    experts: LayerExperts
    items: Sequence[Item]
    beside: Sequence[Item]
    settings: Settings
    limit: int
    workers: ThreadPoolExecutor = field(repr=False)

    def groups(self, seen: ExpertInputs) -> tuple[list[Group], list[Group]]:
        """The matrices that read the input of the experts, and the down projections."""
        group = partial(grouped, self.view, self.items, limit=self.limit, on_cpu=self.stream.device.type == "cpu")
        tokens = {e: len(s.rows) + len(seen.pool) for e, s in seen.tokens.items()}
        return group(down=False), group(down=True, tokens=tokens)

    def each(self, groups: Sequence[Group], code: Callable[[Group], Made]) -> list[Parts]:
        """Code the groups, several at a time, and put the resulting weights into the experts in the order of the
        groups. Returns the tensors to write."""
        packed: list[Parts] = []
        for source, made in self.dealt(groups, code):
            self.experts.put(copied_from(source, None if made is None else made.weights))
            packed.append(copied_from(source, None if made is None else merged(made.packed)))
        return packed

    def dealt(self, groups: Sequence[Group], work: Callable[[Group], R]) -> Iterator[tuple[int, R | None]]:
        """(the process that works on a group, its result there and None elsewhere) for each group, in order."""
        world = current()
        done = self.workers.map(torch.no_grad()(work), groups[world.rank :: world.size])
        for number in range(len(groups)):
            source = number % world.size
            yield source, next(done) if source == world.rank else None

    def round(self, groups: Sequence[Group]) -> None:
        """Put the weights of round-to-nearest into the experts, group by group."""
        for group in groups:
            coded = round_to_nearest(self.stacked(group), group.grid, group=group.size)
            self.experts.put(by_matrix(group, coded.decoded()))

    def stacked(self, group: Group) -> Tensor:
        """The weights of a group in float32, those of one expert stacked along the rows: [E, out, in]. Raises
        InputError for values that are not finite."""
        items = [item for of_expert in group.items for item in of_expert]
        parts = [packed_source(self.model.checkpoint, item) for item in items]
        rows = torch.cat(parts).to(self.stream.device).float()
        if not all_finite(rows):
            check_finite(items, parts)
        return rows.view(len(group.items), -1, rows.shape[1])

    # -- the model --------------------------------------------------------------------------------------------------

    def inputs(self) -> ExpertInputs:
        """Compute the layer once, unquantized, and return the inputs of its experts."""
        windows, length = self.stream.share.windows, self.stream.windows.shape[1]
        inputs = self._allocated(windows * length)
        index, weights = [], []
        for batch in self.layer.batches(advance=False):
            assert batch.top_k_index is not None and batch.top_k_weights is not None
            at = self.stream.share.mine[batch.rows]
            inputs.view(windows, length, -1)[at] = batch.expert_input.view(len(at), length, -1).to("cpu", inputs.dtype)
            index.append(batch.top_k_index.cpu())
            weights.append(batch.top_k_weights.float().cpu())
        summed(inputs)  # of disjoint windows
        rows = self.stream.share.rows(length).flatten()
        held = torch.from_numpy(heldout.held_out(windows, length)).flatten()
        chosen, scores = (joined(torch.cat(parts), rows, len(held)) for parts in (index, weights))
        pool = self._pool(held)
        experts = sorted({int(role_of(self.view, item).expert or 0) for item in self.items})
        seen = expert_tokens(chosen, scores, ~held, experts=experts, pooled=len(pool))
        return ExpertInputs(inputs, chosen, scores, held, pool, seen)

    def target(self, seen: ExpertInputs, rows: Tensor) -> Target:
        """What the experts compute now for the tokens `rows` int64 [n]."""
        wanted = self._allocated(len(rows))
        for part, of in self._parts(wanted, rows):
            part.copy_(self.experts.outputs(seen.arguments, of))
        return Target(rows, summed(wanted))

    def squares(self, seen: ExpertInputs, target: Target) -> Tensor:
        """The squared error of the experts' outputs for each token of the target: float64 [n]."""
        found = torch.zeros(len(target.rows), dtype=torch.float64)
        parts = self._parts(found, target.rows, target.outputs)
        for part, rows, wanted in parts:
            made = self.experts.outputs(seen.arguments, rows)
            part.copy_(squared_errors(made, wanted.to(made.device)))
        return summed(found)

    def _allocated(self, rows: int) -> Tensor:
        """Room for activations [rows, D]. Of several processes, each fills its part of what are zeros here."""
        made = allocate((rows, self.model.expert_dimension), torch.float32, self.stream.max_memory)
        return made.zero_() if current().size > 1 else made

    def _parts(self, *along: Tensor) -> list[tuple[Tensor, ...]]:
        """The parts of OUTPUT_ROWS rows that this process computes, as views of tensors of equal length."""
        world = current()
        return list(zip(*(t.split(OUTPUT_ROWS) for t in along), strict=True))[world.rank :: world.size]

    def _pool(self, held: Tensor) -> Tensor:
        """The positions of the tokens that are used for the codes of every expert, sorted."""
        free = (~held).nonzero().flatten()
        draw = generator((self.settings.seed, "codes", self.layer.index))
        count = min(POOLED, len(free))
        return free[torch.from_numpy(draw.choice(len(free), size=count, replace=False, shuffle=False)).sort().values]


def merged(parts: Sequence[Parts]) -> Parts:
    """All tensors of several parts."""
    return {name: tensor for part in parts for name, tensor in part.items()}


def packed_parts(group: Group, coded: Coded) -> list[Parts]:
    """The tensors of a group's matrices as on disk."""
    fields = [field.cpu() for field in (coded.levels, coded.scales, coded.unit) if field is not None]
    apart = zip(*(by_matrix(group, field).values() for field in fields), strict=True)
    items = (item for of_expert in group.items for item in of_expert)
    return [on_disk(item, Coded(*of_one)) for item, of_one in zip(items, apart, strict=True)]


def shared_tokens(seen: ExpertInputs, group: Group, device: torch.device) -> tuple[Tensor, Tensor, list[int]]:
    """(rows int64 [n], weights float32 [n], number of tokens per expert) of the tokens that are used for the codes of a
    group's experts: their own and the pool's, expert by expert."""
    own = [seen.tokens[e] for e in group.experts]
    rows = torch.cat([part for s in own for part in (s.rows, seen.pool)])
    weights = torch.cat([part for s in own for part in (s.weights, torch.full((len(seen.pool),), s.rest))])
    return rows, weights.to(device), [len(s.rows) + len(seen.pool) for s in own]
