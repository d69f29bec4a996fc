"""Choosing codes by data: the model is streamed a layer at a time, the layers in front already quantized.

For each expert of a layer: second moments of what it is given, weighted by the router (MoEQuant, arXiv 2505.03804),
GPTQ of gate and up on them, then of down on the hidden activations behind the quantized gate and up. Codes and scales
go into an overlay, named as on disk; moments are gone with their layer.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from moeconv.checkpoint.artifact import artifact_metadata
from moeconv.checkpoint.overlay import writing_overlay
from moeconv.data import heldout
from moeconv.data.windows import load_tokens, sequence_length
from moeconv.errors import InputError, UsageError
from moeconv.families import packed
from moeconv.families.model import Model
from moeconv.families.spec import Role
from moeconv.options import SEQ_LEN, TOKENS, DataOptions, MeasureOptions, parse_size
from moeconv.plan.kernels.chain import last_stage
from moeconv.plan.kernels.stored import to_bytes
from moeconv.plan.meter import Meter, SilentMeter
from moeconv.plan.plan import Item
from moeconv.quantize.gptq.grids import grid_of, on_disk
from moeconv.quantize.gptq.levels import Coded, Grid, round_to_nearest
from moeconv.quantize.gptq.moments import POOLED, Shown, moments, shown
from moeconv.quantize.gptq.solve import damped, gptq, retarget
from moeconv.randomness import generator
from moeconv.stream.layers import Layer, LayerStream, pick_device, start_meter, stream_within
from moeconv.stream.memory import allocate
from moeconv.stream.need import CODED_BYTES, GPTQ, PAIR_ROWS, codes_bytes
from moeconv.stream.products import OnProducts
from moeconv.tensors import decode_weight, packed_source

VERSION = 1
_COLUMN = 8192  # weights of all experts' columns that are worked on by one call on the CPU

Put = Callable[[Mapping[str, Tensor]], None]


def choose_codes(
    model: Model,
    items: Sequence[Item],
    path: str | os.PathLike[str],
    *,
    data: DataOptions,
    measure: MeasureOptions,
    damping: float,
    view: Model | None = None,
    seed: int = 0,
    jobs: int = 1,
    meter: Meter | None = None,
) -> dict[str, Any]:
    """Write an overlay with the outputs of `items`, planned packings of expert weights; returns {layers: [{layer,
    output_rms, output_rms_rtn, output_rms_gptq, kept, fewest_tokens, tokens_per_expert}], tokens, held_out}.

    `view` is the model whose weights the items pack, where it is not `model` itself but planned on it: decoded, or with
    its experts taken apart. The overlay is then of that one.

    `output_rms` is the error of the layer's FFN against the unquantized one on the same inputs, relative, on tokens
    that chose nothing; `output_rms_rtn` is what round-to-nearest has there, `output_rms_gptq` what the chosen codes
    have. Where they err more, the layer gets the nearest codes and `kept` is False. `jobs` groups of experts are coded
    at the same time, on the CPU; the codes do not depend on it.
    Raises InputError for unusable data, or activations that are not finite.
    """
    if not 0 < damping < 1e6:
        raise UsageError(f"--damping {damping} must be above 0", hint="0.01 is usual.")
    view = view or model
    budget = None if measure.max_memory is None else parse_size(measure.max_memory, flag="--max-memory")
    meter = meter or SilentMeter()
    meter.note("reading the data")
    read = load_tokens(
        data.data, model.checkpoint.path, tokens=measure.tokens or TOKENS,
        seq_len=sequence_length(model, measure.seq_len, default=SEQ_LEN), seed=seed, text_field=measure.text_field,
    )  # fmt: skip
    start_meter(meter, model)
    stream = stream_within(
        model, read.windows, dtype=torch.float32, device=pick_device(measure.device), batch_size=measure.batch_size,
        budget=budget, meter=meter, what="gptq", coders=jobs, **GPTQ,
    )  # fmt: skip
    sources = [{"name": s.name, "sha256": s.sha256, "tokens": s.tokens} for s in read.sources]
    metadata = artifact_metadata(
        "overlay", version=VERSION, identity=view.identity, method="gptq", damping=damping, seed=seed,
        seq_len=read.seq_len, sources=sources,
    )  # fmt: skip
    by_layer: dict[int | None, list[Item]] = {}
    for item in items:
        by_layer.setdefault(_role_of(view, item).layer, []).append(item)
    tensors = [(_role_of(view, i).layer, (s.name, s.dtype, s.shape)) for i in items for s in i.outputs]
    rows = []
    limit, workers = _room(stream, jobs)
    with (
        writing_overlay(Path(path), tensors, metadata=metadata) as writer,
        ThreadPoolExecutor(workers, thread_name_prefix="moeconv-codes") as pool,
    ):

        def put(parts: Mapping[str, Tensor]) -> None:
            for name, tensor in parts.items():
                writer.write(name, to_bytes(tensor))

        for layer in stream.layers():
            if layer.index in by_layer:
                work = _Layer(model, view, stream, layer, by_layer[layer.index], damping, seed, limit, pool)
                with torch.no_grad():
                    rows.append(work.run(put))
                meter.note(
                    f"layer {layer.index}: output error {rows[-1]['output_rms']:.4f}, "
                    f"round-to-nearest {rows[-1]['output_rms_rtn']:.4f}"
                )
    return {"layers": rows, "tokens": read.tokens, "held_out": int(heldout.held_out(*read.windows.shape).sum())}


def _room(stream: LayerStream, jobs: int) -> tuple[int, int]:
    """(bytes of experts that are coded together, how many such groups at a time)."""
    if stream.device.type != "cpu":
        return max(CODED_BYTES, torch.cuda.mem_get_info(stream.device)[0] // 4), 1
    tight = stream.placement is not None and not stream.placement.held
    return (0, 1) if tight else (CODED_BYTES, jobs)


def remarks_on(found: Mapping[str, Any]) -> list[str]:
    """Warnings of `choose_codes`: too little text, and layers that keep the nearest codes."""
    return heldout.remarks_on(found["layers"], what="--method gptq", kept="round-to-nearest, because the chosen codes")


def _name_of(item: Item) -> str:
    """The weight that an item packs, by its name in the view."""
    return packed.weight_of(item.outputs[0].name)


def _role_of(view: Model, item: Item) -> Role:
    return view.roles[_name_of(item)]


@dataclass(frozen=True, eq=False)
class _Seen:
    """What a layer's experts were given. inputs [T, H], index and weights [T, k]; held bool [T]; `pool` int64 [P],
    tokens that every expert is shown; `shown` by expert."""

    inputs: Tensor
    index: Tensor
    weights: Tensor
    held: Tensor
    pool: Tensor
    shown: Mapping[int, Shown]


@dataclass(frozen=True, eq=False)
class _Group:
    """Experts whose matrices are coded together: `items[e]` of each have the same shapes and lie on the same `grid`,
    `size` weights to a scale."""

    experts: tuple[int, ...]
    items: tuple[tuple[Item, ...], ...]
    grid: Grid
    size: int


@dataclass(eq=False)
class _Weights:
    """A layer's weights by name in the view: `rounded` to the nearest level, `chosen` (until it is chosen: as it is);
    and `packed`, what is written of the chosen ones: small beside the weights."""

    rounded: dict[str, Tensor]
    chosen: dict[str, Tensor]
    packed: list[Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class _Layer:
    """The work on one layer. `items` are the packings of its experts' weights; groups of at most `limit` bytes are
    coded by `workers` at the same time."""

    model: Model
    view: Model
    stream: LayerStream
    layer: Layer
    items: Sequence[Item]
    damping: float
    seed: int
    limit: int
    workers: ThreadPoolExecutor

    def run(self, put: Put) -> dict[str, Any]:
        """Choose and put the codes of all experts, and advance the layer with them in place. The nearest codes stand
        where the chosen ones err more on the held-out tokens."""
        experts = self.layer.experts
        assert experts is not None
        if not hasattr(experts, "down_proj"):
            raise InputError(
                f"{type(experts).__name__} of transformers keeps no down_proj of its experts, which this computes with",
                hint="Use --method rtn or mse.",
            )
        seen = self._look()
        original = copy.deepcopy(experts)
        found = _Weights({}, {}, [])
        given = self._grouped(down=False)
        downs = self._grouped(down=True, tokens={e: len(s.rows) + len(seen.pool) for e, s in seen.shown.items()})
        self._each(given, partial(self._code_given, seen, self._pooled(seen)), found)
        self._each(downs, self._round, found)
        wanted = self._output(seen, seen.held)
        self._fill(found.rounded)
        baseline = _relative(self._output(seen, seen.held), wanted)
        self._fill(found.chosen)
        self._each(downs, partial(self._code_down, seen, original, dict(found.chosen)), found)
        del original
        self._fill(found.chosen)
        reached = _relative(self._output(seen, seen.held), wanted)
        kept = reached <= baseline
        if not kept:
            self._fill(found.rounded)
        for parts in found.packed if kept else (on_disk(item, self._nearest(item)) for item in self.items):
            put(parts)
        for _ in self.layer.batches():  # what the next layer is given
            pass
        counts = [len(s.rows) for s in seen.shown.values()]
        return {
            "layer": self.layer.index,
            "output_rms": min(reached, baseline),
            "output_rms_rtn": baseline,
            "output_rms_gptq": reached,
            "kept": kept,
            "fewest_tokens": min(counts),
            "tokens_per_expert": sum(counts) / len(counts),
        }

    # -- groups --------------------------------------------------------------------------------------------------

    def _each(self, groups: Sequence[_Group], code: Callable[[_Group], _Weights], found: _Weights) -> None:
        """Code groups, in any order, and note what comes out, in theirs."""
        for made in self.workers.map(torch.no_grad()(code), groups):
            found.rounded |= made.rounded
            found.chosen |= made.chosen
            found.packed += made.packed

    def _grouped(self, *, down: bool, tokens: Mapping[int, int] = MappingProxyType({})) -> list[_Group]:
        """The down projections, or all others, in groups; an expert's are in one group where they lie on one grid.
        `tokens` are those whose hidden activations are held with an expert."""
        kinds: dict[Any, dict[int, list[Item]]] = {}
        grids: dict[Any, Grid] = {}
        for item in self.items:
            role = _role_of(self.view, item)
            if (role.key.partition(".")[2] == "down") == down:
                grid, size = grid_of(item)
                kind = (grid.key, size, last_stage(item).inputs[0].shape[1])
                grids.setdefault(grid.key, grid)
                kinds.setdefault(kind, {}).setdefault(int(role.expert or 0), []).append(item)
        groups = []
        for (key, size, width), of_experts in kinds.items():
            alike: dict[int, dict[int, list[Item]]] = {}
            for e, items in sorted(of_experts.items()):
                alike.setdefault(sum(last_stage(i).inputs[0].shape[0] for i in items), {})[e] = items
            for out, some in alike.items():
                need = {e: codes_bytes(out, width) + 8 * width * tokens.get(e, 0) for e in some}
                for part in _cut(need, limit=self.limit, most=self._most(out)):
                    groups.append(_Group(tuple(part), tuple(tuple(some[e]) for e in part), grids[key], size))
        return groups

    def _most(self, out: int) -> int:
        """Experts at a time: on the CPU no more than make the work in a column long beside the calls for it."""
        return max(1, _COLUMN // out) if self.stream.device.type == "cpu" else 1 << 30

    # -- codes ---------------------------------------------------------------------------------------------------

    def _code_given(self, seen: _Seen, pooled: Tensor, group: _Group) -> _Weights:
        """Codes of matrices that read what their expert is given."""
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

    def _round(self, group: _Group) -> _Weights:
        """The nearest codes alone; as chosen the weights themselves."""
        weight = self._stacked(group)
        rounded = round_to_nearest(weight, group.grid, group=group.size).decoded()
        return _Weights(_apart(group, rounded), _apart(group, weight), [])

    def _code_down(self, seen: _Seen, original: nn.Module, weights: Mapping[str, Tensor], group: _Group) -> _Weights:
        """Codes of down projections that make up for the gate and up in front of them, where they can."""
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
        weight = torch.stack([torch.cat([weights[_name_of(item)] for item in items]) for items in group.items])
        coded = gptq(retarget(weight, gap, hessian), hessian, group.grid, group=group.size)
        return self._made(group, coded, None)

    def _hidden_moments(
        self, original: nn.Module, inputs: Tensor, rows: Tensor, expert: Tensor, share: Tensor, counts: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Of what down projections are given: its second moment, and that of what the gate and up in front of them have
        lost with it, float64 [E, I, I]."""
        assert self.layer.experts is not None
        given = _hidden(self.layer.experts, inputs, rows, expert, self.stream.device)
        lost = _hidden(original, inputs, rows, expert, self.stream.device).sub_(given)
        moment = moments(lambda at: (given[at], given[at]), share, counts)
        return moment, moments(lambda at: (lost[at], given[at]), share, counts)

    def _made(self, group: _Group, coded: Coded, rounded: Tensor | None) -> _Weights:
        """What was coded, matrix by matrix."""
        apart = zip(_apart(group, coded.levels).values(), _apart(group, coded.scales).values(), strict=True)
        items = (item for items in group.items for item in items)
        packed: list[Mapping[str, Tensor]] = [
            on_disk(item, Coded(*of_one)) for item, of_one in zip(items, apart, strict=True)
        ]
        return _Weights({} if rounded is None else _apart(group, rounded), _apart(group, coded.decoded()), packed)

    def _stacked(self, group: _Group) -> Tensor:
        """The weights of a group, those of one expert below each other: [E, out, in]."""
        return torch.stack([torch.cat([self._weight(item) for item in items]) for items in group.items])

    def _nearest(self, item: Item) -> Coded:
        grid, group = grid_of(item)
        return round_to_nearest(self._weight(item), grid, group=group)

    def _pooled(self, seen: _Seen) -> Tensor:
        """The second moment of the pool, float64 [H, H]."""
        x = seen.inputs[seen.pool].to(self.stream.device)
        return moments(lambda at: (x[at], x[at]), torch.ones(len(x), device=x.device), [len(x)])[0]

    # -- the layer -----------------------------------------------------------------------------------------------

    def _look(self) -> _Seen:
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
        experts = sorted({int(_role_of(self.view, item).expert or 0) for item in self.items})
        seen = shown(chosen, scores, ~held, experts=experts, pooled=len(pool))
        return _Seen(inputs, chosen, scores, held, pool, seen)

    def _pool(self, held: Tensor) -> Tensor:
        """Positions of tokens that every expert is shown."""
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
        """Put weights, by their names in the view, into the layer's experts; what else they have is the source's."""
        experts, skeleton = self.layer.experts, self.stream.skeleton
        assert experts is not None
        names = [n for n, role in self.view.roles.items() if (role.layer, role.group) == (self.layer.index, "expert")]
        skeleton.empty(experts)
        filled = {name: weights[name] if name in weights else decode_weight(self.model, name) for name in names}
        skeleton.fill(filled, under=skeleton.name_of(experts) + ".")

    def _output(self, seen: _Seen, rows: Tensor) -> Tensor:
        """What the experts make of some tokens together, [n, H]."""
        assert self.layer.experts is not None
        made, device = [], self.stream.device
        for part in rows.nonzero().flatten().split(4096):
            given = seen.inputs[part].to(device), seen.index[part].to(device), seen.weights[part].to(device)
            made.append(self.layer.experts(*given))
        return torch.cat(made)


def _relative(made: Tensor, wanted: Tensor) -> float:
    """sqrt(sum (made - wanted)^2 / sum wanted^2)."""
    norm = float(wanted.double().square().sum())
    return (float((made.double() - wanted.double()).square().sum()) / norm) ** 0.5 if norm else 0.0


def _apart(group: _Group, values: Tensor) -> dict[str, Tensor]:
    """values [E, out, ...] of a group by the names of its matrices."""
    found: dict[str, Tensor] = {}
    for items, of_one in zip(group.items, values, strict=True):
        outs = [last_stage(item).inputs[0].shape[0] for item in items]
        found |= zip(map(_name_of, items), of_one.split(outs), strict=True)
    return found


def _cut(need: Mapping[int, int], *, limit: int, most: int) -> Iterator[list[int]]:
    """Experts in order, in parts of at most `limit` bytes and `most` experts, or of one."""
    part: list[int] = []
    for e, nbytes in need.items():
        if part and (len(part) == most or sum(need[i] for i in part) + nbytes > limit):
            yield part
            part = []
        part.append(e)
    if part:
        yield part


def _hidden(experts: nn.Module, inputs: Tensor, rows: Tensor, expert: Tensor, device: torch.device) -> Tensor:
    """What the down projections are given, in any family: [n, I] for rows `rows` int64 [n] of `inputs` [T, H] and
    `expert` int64 [n]."""
    order = expert.argsort(stable=True)  # the stock code takes one expert after the other
    with _inputs_of(experts.down_proj) as found:
        for pairs in order.split(PAIR_ROWS):
            given = inputs[rows[pairs]].to(device)
            experts.forward(given, expert[pairs, None].to(device), given.new_ones(len(given), 1))
    return torch.cat(found)[order.argsort().to(device)]


@contextmanager
def _inputs_of(weight: Any) -> Iterator[list[Tensor]]:
    """Collects the other factor of every product with (a slice of) `weight` inside the block."""
    place = weight.untyped_storage().data_ptr()
    found: list[Tensor] = []

    def seen(factors: Sequence[Any], product: Tensor) -> Tensor:
        if len(factors) > 1 and factors[1].untyped_storage().data_ptr() == place:
            found.append(factors[0])
        return product

    with OnProducts(seen):
        yield found
