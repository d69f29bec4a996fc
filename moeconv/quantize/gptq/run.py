"""Choosing codes by data: the model is streamed a layer at a time, the layers in front already quantized.

For each expert of a layer: second moments of what it is given, weighted by the router (MoEQuant, arXiv 2505.03804),
GPTQ of gate and up on them, then of down on the hidden activations behind the quantized gate and up. Codes and scales
go into an overlay, named as on disk; moments are gone with their layer.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moeconv.checkpoint.overlay import writing_overlay
from moeconv.checkpoint.reader import artifact_metadata
from moeconv.data.heldout import few_tokens, held_out, layers_in_words
from moeconv.data.windows import load_tokens, sequence_length
from moeconv.errors import InputError, UsageError
from moeconv.families import packed
from moeconv.families.model import Model
from moeconv.families.spec import Role
from moeconv.options import SEQ_LEN, TOKENS, DataOptions, MeasureOptions, parse_size
from moeconv.plan.kernels.stored import to_bytes
from moeconv.plan.meter import Meter, SilentMeter
from moeconv.plan.plan import Item
from moeconv.quantize.gptq.grids import grid_of, on_disk
from moeconv.quantize.gptq.matrix import Coded, damped, gptq, retarget, round_to_nearest
from moeconv.randomness import generator
from moeconv.stream.experts import one_expert
from moeconv.stream.layers import Layer, LayerStream, pick_device, start_meter, stream_within
from moeconv.stream.memory import allocate
from moeconv.stream.need import GPTQ
from moeconv.tensors import decode_weight, packed_source

VERSION = 1
POOLED = 512  # tokens of the whole layer that every expert is shown beside its own
PRIOR = 256  # what they weigh, in routed tokens: an expert with few of its own follows them
_COPIES = 6  # of a layer's experts: as they were, rounded, chosen, and those that are being put in place

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
    meter: Meter | None = None,
) -> dict[str, Any]:
    """Write an overlay with the outputs of `items`, planned packings of expert weights; returns {layers: [{layer,
    output_rms, output_rms_rtn, output_rms_gptq, kept, fewest_tokens, tokens_per_expert}], tokens, held_out}.

    `view` is the model whose weights the items pack, where it is not `model` itself but planned on it: decoded, or with
    its experts taken apart. The overlay is then of that one.

    `output_rms` is the error of the layer's FFN against the unquantized one on the same inputs, relative, on tokens
    that chose nothing; `output_rms_rtn` is what round-to-nearest has there, `output_rms_gptq` what the chosen codes
    have. Where they err more, the layer gets the nearest codes and `kept` is False.
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
        budget=budget, meter=meter, what="gptq", **GPTQ,
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
    with writing_overlay(Path(path), tensors, metadata=metadata) as writer:

        def put(parts: Mapping[str, Tensor]) -> None:
            for name, tensor in parts.items():
                writer.write(name, to_bytes(tensor))

        for layer in stream.layers():
            if layer.index in by_layer:
                work = _Layer(model, view, stream, layer, by_layer[layer.index], damping, seed)
                with torch.no_grad():
                    rows.append(work.run(put))
                meter.note(
                    f"layer {layer.index}: output error {rows[-1]['output_rms']:.4f}, "
                    f"round-to-nearest {rows[-1]['output_rms_rtn']:.4f}"
                )
    return {"layers": rows, "tokens": read.tokens, "held_out": int(held_out(*read.windows.shape).sum())}


def remarks_on(found: Mapping[str, Any]) -> list[str]:
    """Warnings of `choose_codes`: too little text, and layers that keep the nearest codes."""
    rows = found["layers"]
    warnings = few_tokens({row["layer"]: row["tokens_per_expert"] for row in rows}, what="--method gptq")
    back = [row["layer"] for row in rows if not row["kept"]]
    if back:
        warnings.append(
            f"--method gptq: {layers_in_words(back)} keep round-to-nearest, because the chosen codes err more on "
            "held-out tokens"
        )
    return warnings


def _name_of(item: Item) -> str:
    """The weight that an item packs, by its name in the view."""
    return packed.weight_of(item.outputs[0].name)


def _role_of(view: Model, item: Item) -> Role:
    return view.roles[_name_of(item)]


@dataclass(frozen=True, eq=False)
class _Seen:
    """What a layer's experts were given. inputs [T, H], index and weights [T, k]; held bool [T]."""

    inputs: Tensor
    index: Tensor
    weights: Tensor
    held: Tensor


@dataclass(frozen=True, eq=False)
class _Expert:
    """The tokens that shape one expert's codes: rows of _Seen, and weights that sum to 1."""

    rows: Tensor
    weights: Tensor
    tokens: int

    def moment(self, left: Tensor, right: Tensor | None = None) -> Tensor:
        """Weighted sum of left right^T over tokens, float64 [in, in]."""
        right = left if right is None else right
        total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64, device=left.device)
        for a, b, c in zip(left.split(4096), right.split(4096), self.weights.split(4096), strict=True):
            total += ((a * c[:, None]).T @ b).double()
        return total


@dataclass(frozen=True, eq=False)
class _Layer:
    """The work on one layer. `items` are the packings of its experts' weights."""

    model: Model
    view: Model
    stream: LayerStream
    layer: Layer
    items: Sequence[Item]
    damping: float
    seed: int

    def run(self, put: Put) -> dict[str, Any]:
        """Choose and put the codes of all experts, and advance the layer with them in place. The nearest codes stand
        where the chosen ones err more on the held-out tokens."""
        experts = self.layer.experts
        assert experts is not None
        seen = self._look()
        original = copy.deepcopy(experts)
        by_expert: dict[int, dict[str, Item]] = {}
        for item in self.items:
            role = _role_of(self.view, item)
            by_expert.setdefault(int(role.expert or 0), {})[role.key.partition(".")[2]] = item
        pool = self._pool(seen)
        shown = {e: self._shown(seen, e, pool) for e in by_expert}
        chosen: list[Mapping[str, Tensor]] = []  # packed: small beside the weights
        weights: dict[str, Tensor] = {}
        rounded: dict[str, Tensor] = {}
        for e, parts in by_expert.items():
            x = seen.inputs[shown[e].rows].to(self.stream.device)
            hessian = damped(shown[e].moment(x), self.damping)
            for part, item in parts.items():
                weight, (grid, group) = self._weight(item), grid_of(item)
                rounded[_name_of(item)] = self._nearest(item).decoded()
                if part == "down":
                    weights[_name_of(item)] = weight
                    continue
                coded = gptq(weight, hessian, grid, group=group)
                chosen.append(on_disk(item, coded))
                weights[_name_of(item)] = coded.decoded()
        wanted = self._output(seen, seen.held)
        self._fill(rounded)
        baseline = _relative(self._output(seen, seen.held), wanted)
        self._fill(weights)
        for e, parts in by_expert.items():
            item = parts["down"]
            x = seen.inputs[shown[e].rows].to(self.stream.device)
            coded = self._down(item, weights[_name_of(item)], shown[e], _hidden(original, x, e),
                               _hidden(experts, x, e))  # fmt: skip
            chosen.append(on_disk(item, coded))
            weights[_name_of(item)] = coded.decoded()
        del original
        self._fill(weights)
        reached = _relative(self._output(seen, seen.held), wanted)
        kept = reached <= baseline
        if not kept:
            chosen = [on_disk(item, self._nearest(item)) for item in self.items]
            self._fill(rounded)
        for coded_parts in chosen:
            put(coded_parts)
        for _ in self.layer.batches():  # what the next layer is given
            pass
        return {
            "layer": self.layer.index,
            "output_rms": min(reached, baseline),
            "output_rms_rtn": baseline,
            "output_rms_gptq": reached,
            "kept": kept,
            "fewest_tokens": min(s.tokens for s in shown.values()),
            "tokens_per_expert": sum(s.tokens for s in shown.values()) / len(shown),
        }

    def _nearest(self, item: Item) -> Coded:
        grid, group = grid_of(item)
        return round_to_nearest(self._weight(item), grid, group=group)

    def _down(self, item: Item, weight: Tensor, shown: _Expert, wanted: Tensor, given: Tensor) -> Coded:
        """Codes of a down projection that make up for the gate and up in front of it, where they can."""
        moment = shown.moment(given)
        hessian = damped(moment, self.damping)
        mean = float(moment.diagonal().mean())
        if mean > 0:
            weight = retarget(weight, shown.moment(wanted - given, given) / mean, hessian)
        grid, group = grid_of(item)
        return gptq(weight, hessian, grid, group=group)

    def _look(self) -> _Seen:
        tokens, length = self.stream.windows.numel(), self.stream.windows.shape[1]
        inputs = allocate((tokens, self.model.hidden_size), torch.float32, self.stream.max_memory)
        index, weights = [], []
        for batch in self.layer.batches(advance=False):
            assert batch.top_k_index is not None and batch.top_k_weights is not None
            inputs[batch.rows.start * length : batch.rows.stop * length].copy_(batch.ffn_input)
            index.append(batch.top_k_index.cpu())
            weights.append(batch.top_k_weights.float().cpu())
        held = torch.from_numpy(held_out(*self.stream.windows.shape)).flatten()
        return _Seen(inputs, torch.cat(index), torch.cat(weights), held)

    def _pool(self, seen: _Seen) -> Tensor:
        """Positions of tokens that every expert is shown."""
        free = (~seen.held).nonzero().flatten()
        draw = generator((self.seed, "codes", self.layer.index))
        count = min(POOLED, len(free))
        return free[torch.from_numpy(draw.choice(len(free), size=count, replace=False, shuffle=False)).sort().values]

    def _shown(self, seen: _Seen, expert: int, pool: Tensor) -> _Expert:
        token, slot = ((seen.index == expert) & ~seen.held[:, None]).nonzero(as_tuple=True)
        scores = seen.weights[token, slot].clamp(min=0)
        own, count = float(scores.sum()), len(token)
        share = count / (count + PRIOR) if own > 0 else 0.0
        scores = scores * (share / own) if own > 0 else torch.zeros_like(scores)
        rows = torch.cat([token, pool])
        weights = torch.cat([scores, torch.full((len(pool),), (1 - share) / max(1, len(pool)))])
        return _Expert(rows, weights.to(self.stream.device), count)

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


def _hidden(experts: nn.Module, x: Tensor, expert: int) -> Tensor:
    """What expert `expert`'s down projection is given for inputs x [n, H], in any family: [n, I]."""
    with _inputs_of(experts.down_proj) as found:
        one_expert(experts.forward, x, expert)
    return torch.cat(found)


@contextmanager
def _inputs_of(weight: Any) -> Iterator[list[Tensor]]:
    """Collects the other factor of every product with (a slice of) `weight` inside the block."""
    place = weight.untyped_storage().data_ptr()
    found: list[Tensor] = []
    products = (nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, torch.Tensor.mm)

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in products and len(args) > 1 and args[1].untyped_storage().data_ptr() == place:
                found.append(args[0])
            return func(*args, **(kwargs or {}))

    with Watch():
        yield found
