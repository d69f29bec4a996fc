"""The layer stream: run a checkpoint of any size a decoder layer at a time, one layer's weights in memory.

Masks, rotary embeddings and layer types come from the stock forward itself: it runs once over layers that only write
down what they are called with. While a layer computes, the system is told to bring the next one's bytes into its cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moeconv.errors import InputError, UsageError
from moeconv.families.model import Model
from moeconv.plan.kernels.stored import TORCH_DTYPES
from moeconv.plan.memory import lean_malloc
from moeconv.plan.meter import Meter, SilentMeter
from moeconv.stream.finite import check_finite
from moeconv.stream.hooks import Calls, captured, distinct_tensors, record_calls, replaced
from moeconv.stream.memory import MAPPED, allocate, release_memory
from moeconv.stream.need import MemoryPlacement, Need, Workload, need_of, noted_placement, together
from moeconv.stream.skeleton import Skeleton
from moeconv.stream.stored import Names, names_of, place
from moeconv.tensors import decode_weight, plain_name, plain_names


@dataclass(frozen=True, eq=False)
class Batch:
    """One forward pass of one layer over windows `rows`; b windows of S tokens, T = b * S tokens.

    `inputs`, `outputs` [b, S, H] are the residual stream in front of the layer and behind it; `residual` [T, H] is what
    the norm in front of the FFN reads (the FFN itself, in families without a norm there); `ffn_input`, `ffn_output`
    [T, H] are what the FFN block (shared expert included) takes and gives. MoE layers: `router_logits` [T, E],
    `top_k_index` int64 [T, k], `top_k_weights` [T, k], the weights that the model really gives to its experts.
    """

    rows: slice
    inputs: Tensor
    outputs: Tensor
    residual: Tensor
    ffn_input: Tensor
    ffn_output: Tensor
    router_logits: Tensor | None = None
    top_k_index: Tensor | None = None
    top_k_weights: Tensor | None = None


@dataclass(eq=False)
class Layer:
    """A decoder layer with its weights in place. `router` and `experts` are None in a dense layer.

    `norm` is the one in front of the FFN, None where the family has none there. `experts(x [T, H], top_k_index [T, k],
    top_k_weights [T, k])` is the stock experts module: `experts(x, e, 1)` is expert e's output in any family.
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

    def run(self, hidden: Tensor) -> Tensor:
        """The layer's output for inputs [b, S, H] of the stream's batch sizes; follows the caller's grad mode."""
        args, kwargs = self._stream.arguments(len(hidden), self.index)
        out = self.module(hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    @property
    def biases(self) -> list[Tensor]:
        """What the router adds to its scores beside its weight: tensors [E] or [1, E] in their places."""
        state = self._stream.skeleton.module.state_dict(keep_vars=True)
        return [state[self._stream.skeleton.place(name)].detach() for name in self._stream.router_extras(self.index)]

    @property
    def scale(self) -> Tensor | None:
        """What each expert's weight is multiplied by behind the rule [E], in families that do."""
        family, skeleton = self._stream.model.family, self._stream.skeleton
        if not family.has("router.scale"):
            return None
        return skeleton.module.get_parameter(skeleton.place(family.name("router.scale", layer=self.index))).detach()

    def batches(self, *, advance: bool = True, hidden: Tensor | None = None) -> Iterator[Batch]:
        """Workload the layer over all windows. `advance` makes the outputs the next layer's inputs as the batches are
        consumed, and is possible once and to the end; without it the pass can be repeated. With `hidden` [n, S, H] the
        inputs are read from there and the outputs go there, and the stream itself stays where it is. Raises
        NotFiniteError where the layer makes NaN or infinity."""
        own = hidden is None
        if own and (self.advanced or self._halfway):
            raise ValueError(f"layer {self.index} has been passed already")
        self._halfway = advance if own else self._halfway
        flow = self._stream.hidden if hidden is None else hidden
        for rows in self._stream.rows():
            inputs = flow[rows].to(self._stream.device)
            model = self._stream.model
            on_input = model.top_k if model.family.experts.routing and model.family.experts.routing.on_input else 0
            parts = (self.norm, self.ffn, self.router, self.experts)
            with torch.no_grad(), captured(*parts, on_input=on_input) as seen:
                outputs = self.run(inputs)
            check_finite(model, outputs, layer=self.index)
            yield Batch(rows=rows, inputs=inputs, outputs=outputs, **seen)
            if advance:
                flow[rows].copy_(outputs)
            del inputs, outputs, seen  # where the caller lets go too, before the next batch is computed
        if own:
            self.advanced, self._halfway = advance, False

    def free(self) -> None:
        """Let go of the weights, all batches being through, before the next layer is asked for."""
        self._stream.skeleton.empty(self.module)
        release_memory()

    def pass_on(self) -> None:
        """Advance without looking."""
        for batch in self.batches():
            del batch


class LayerStream:
    """A model's pass over `windows` int64 [n, S], a layer at a time; holds the activations `hidden` [n, S, H] (on the
    CPU, in `dtype`) and one layer's weights.

    Iterate `layers()` once, then `logits()` as often as needed. `dtype` None is float32 on the CPU, elsewhere the
    checkpoint's own. Activations of more than `max_memory` bytes lie in an unnamed file that is mapped into memory.
    Unless `held`, a large layer's experts stay on disk and are read whenever they are computed with.
    `in_place`: experts are ordinary parameters in `dtype`, instead of staying as they are stored.
    `meter` hears of every layer that is done. Raises InputError for token ids outside the vocabulary or a checkpoint
    that does not load strictly.
    """

    def __init__(
        self,
        model: Model,
        windows: np.ndarray | Tensor,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        batch_size: int = 8,
        experts: str = "eager",
        max_memory: int | None = None,
        held: bool = True,
        in_place: bool = False,
        meter: Meter | None = None,
    ) -> None:
        if batch_size < 1:
            raise UsageError("--batch-size must be at least 1")
        self.model, self.batch_size, self.max_memory = model, batch_size, max_memory
        self.held, self.in_place = held, in_place
        self.placement: MemoryPlacement | None = None
        self._meter = meter or SilentMeter()
        self.device = torch.device(device)
        self.dtype = dtype or default_dtype(model, self.device)
        self.windows = torch.as_tensor(windows, dtype=torch.int64)
        self.skeleton = Skeleton(model, dtype=self.dtype, device=self.device, experts=experts)
        self._names: dict[int | None, list[str]] = {}
        for name, layer in plain_names(model):
            self._names.setdefault(layer, []).append(name)
        self._check_ids()
        self._calls: dict[int, Calls] = {}
        self.hidden = self._embed()
        self._next_layer = 0

    def skip_to(self, layer: int) -> None:
        """Begin at this layer: the caller has put what goes into it in `hidden`."""
        self._next_layer = layer

    def rows(self) -> Iterator[slice]:
        """The batches, as slices of the windows."""
        for start in range(0, len(self.windows), self.batch_size):
            yield slice(start, min(start + self.batch_size, len(self.windows)))

    def layers(self) -> Iterator[Layer]:
        """Every decoder layer in order, its weights in place until the next one is asked for.

        A layer that the consumer did not advance is run then.
        """
        first = self._next_layer
        for index in range(first):
            self._meter.advance(layer_bytes(self.model, index))
            self._meter.part_done()
        if first == self.model.num_layers:
            return
        with ThreadPoolExecutor(1, thread_name_prefix="moeconv-read") as pool:
            for index, module in enumerate(self.skeleton.layers):
                if index < first:
                    continue
                layer = self._layer(index, module)
                self._fill_layer(layer)
                if index + 1 < self.model.num_layers:
                    pool.submit(self.model.checkpoint.advise, self._stored_names(index + 1))
                yield layer
                if not layer.advanced:
                    layer.pass_on()
                self.skeleton.empty(module)
                release_memory()
                self._next_layer = index + 1
                self._meter.advance(layer_bytes(self.model, index))
                self._meter.part_done()

    def arguments(self, rows: int, layer: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the stock model gives a layer beside the hidden states of a batch of `rows` windows."""
        return self._calls[rows][layer]

    def router_extras(self, layer: int) -> list[str]:
        """Names on disk of what a router adds to its scores for the choice."""
        of_layer = ((n, r) for n, r in self.model.roles.items() if r.layer == layer and r.group == "router")
        # a plain bias is part of the logits already, and a scale has no part in the choice
        beside = ("router.weight", "router.bias", "router.scale")
        return [plain_name(name, r) for name, r in of_layer if r.key not in beside]

    def run(self) -> LayerStream:
        """Pass all layers without looking."""
        for _ in self.layers():
            pass
        return self

    def logits(self, *, batch_size: int = 1) -> Iterator[tuple[slice, Tensor]]:
        """(rows, logits [b, S, vocabulary]) of the stock tail: final norm and output embeddings, tied or not."""
        return ((rows, logits[0]) for rows, logits in self.tails([self.hidden], batch_size=batch_size))

    @torch.no_grad()
    def tails(self, flows: Sequence[Tensor], *, batch_size: int = 1) -> Iterator[tuple[slice, list[Tensor]]]:
        """(rows, the logits that the stock tail gives for each of several final activations [n, S, H])."""
        if self._next_layer != self.model.num_layers:
            raise ValueError("logits need all layers to be passed first")
        embedding = self._embedding_names()
        tied = bool(self.skeleton.module.all_tied_weights_keys)
        names = [n for n in self._names[None] if tied or n not in embedding]
        self._fill(names, under="")
        self.skeleton.tie()
        missing = [n for n, p in self.skeleton.module.get_output_embeddings().named_parameters() if p.is_meta]
        if missing:
            raise InputError("the checkpoint has no output embeddings", hint="A shard is missing.")
        try:
            for start in range(0, len(self.windows), batch_size):
                rows = slice(start, min(start + batch_size, len(self.windows)))
                yield rows, [self._tail(flow[rows].to(self.device)) for flow in flows]
        finally:
            for child in (self.skeleton.module.get_output_embeddings(), *self.skeleton.decoder.children()):
                self.skeleton.empty(child)
            release_memory()

    def _tail(self, hidden: Tensor) -> Tensor:
        with replaced(self.skeleton.layers, lambda _index, _given, _args, _kwargs: hidden):
            return self.skeleton.module(inputs_embeds=hidden, use_cache=False).logits

    # -- inside --------------------------------------------------------------------------------------------------

    def _check_ids(self) -> None:
        size = self.skeleton.module.get_input_embeddings().weight.shape[0]
        if self.windows.ndim != 2 or self.windows.numel() == 0:
            raise InputError("no tokens to run the model on", hint="Give more text.")
        low, high = int(self.windows.min()), int(self.windows.max())
        if low < 0 or high >= size:
            raise InputError(
                f"token id {high if high >= size else low} is outside the model's vocabulary of {size}",
                hint="The tokenizer in the checkpoint's directory belongs to another model.",
            )

    def _stored_names(self, layer: int) -> list[str]:
        return [name for name, role in self.model.roles.items() if role.layer == layer]

    def _fill_layer(self, layer: Layer) -> None:
        """Give a layer its weights: the experts as they are stored, the others as they are computed with."""
        under, names = self.skeleton.name_of(layer.module) + ".", self._names[layer.index]
        experts = names_of(self.model, layer.index) if layer.experts is not None else None
        if layer.experts is None or experts is None or not self._place(layer.experts, experts):
            return self._fill(names, under=under)
        placed = {*experts.packed, *(name for of_one in experts.alone for name in of_one)}
        beside = self.skeleton.name_of(layer.experts) + "."
        self._fill([name for name in names if name not in placed], under=under, beside=beside)

    def _place(self, experts: nn.Module, names: Names) -> bool:
        return place(self.skeleton, experts, names, in_place=self.in_place, held=self.held)

    def _fill(self, names: list[str], *, under: str, beside: str | None = None) -> None:
        """Read, decode and place tensors."""
        tensors = {name: decode_weight(self.model, name) for name in names}
        self.skeleton.fill(tensors, under=under, beside=beside)

    def _embedding_names(self) -> list[str]:
        place = self.skeleton.name_of(self.skeleton.module.get_input_embeddings()) + "."
        return [name for name in self._names[None] if self.skeleton.place(name).startswith(place)]

    @torch.no_grad()
    def _embed(self) -> Tensor:
        """The first layer's inputs [n, S, H]; notes on the way what every layer is called with, per batch size."""
        embedding = self.skeleton.module.get_input_embeddings()
        self._fill(self._embedding_names(), under=self.skeleton.name_of(embedding) + ".")
        hidden = allocate((*self.windows.shape, self.model.hidden_size), self.dtype, self.max_memory)
        for rows in self.rows():
            ids = self.windows[rows].to(self.device)
            first, calls = record_calls(self.skeleton.decoder, self.skeleton.layers, ids)
            hidden[rows].copy_(first)
            # Windows are whole, so nothing but the batch's shape decides masks and positions: kept once per shape.
            kept = self._calls.setdefault(len(first), calls)
            if not all(map(torch.equal, distinct_tensors(kept), distinct_tensors(calls))):
                raise InputError(
                    f"{self.model.family.model_type} cannot be streamed: its layers look at the tokens themselves",
                    hint="This family is not supported by the commands that run a model.",
                )
        check_finite(self.model, hidden, layer=None)
        self.skeleton.empty(embedding)
        release_memory()
        return hidden

    def _layer(self, index: int, module: nn.Module) -> Layer:
        """The modules of a layer, found through the places of its tensors."""
        first: dict[str, str] = {}
        for name, role in self.model.roles.items():
            if role.layer == index:
                first.setdefault(
                    role.key if role.key in ("norm.ffn", "router.weight") else role.group, plain_name(name, role)
                )
        norm = self.skeleton.owner(first["norm.ffn"]) if "norm.ffn" in first else None
        if index not in self.model.moe_layers:
            # a layer without an FFN is looked at as a whole
            ffn = self.skeleton.parent(self.skeleton.owner(first["ffn"])) if "ffn" in first else module
            return Layer(index, module, norm, ffn, None, None, self)
        router = self.skeleton.owner(first["router.weight"])
        experts = self.skeleton.owner(first["expert"])
        for _ in range(self.model.family.experts.modules_above):
            experts = self.skeleton.parent(experts)
        above = self.skeleton.parent(experts)
        # experts that are no part of a block of their own are looked at alone
        return Layer(index, module, norm, experts if above is module else above, router, experts, self)


def stream_within(
    model: Model, windows: np.ndarray, *, budget: int | None, what: str, meter: Meter, dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu", batch_size: int = 8, experts: str = "eager", beside: Sequence[Need] = (),
    **asks: Any,
) -> LayerStream:  # fmt: skip
    """A stream that takes at most `budget` bytes of memory, or without a budget at most what is free. Where the experts
    and the activations do not fit, they stay on the disk; the stream's `placement` says which do.

    `asks` are fields of `need.Workload`. `beside` are the needs of what else the process does, before or after.
    On another device than the CPU the budget is for the activations alone. Raises what `need.choose_placement` raises,
    before anything is read."""
    device = torch.device(device)
    dtype, limit, held, found = dtype or default_dtype(model, device), budget, True, None
    if device.type == "cpu":
        lean_malloc(MAPPED)
        run = Workload(windows.size, windows.shape[-1], batch_size, dtype.itemsize, **asks)
        found = noted_placement(together([need_of(model, run), *beside]), budget=budget, meter=meter, what=what)
        limit, held = found.activations, found.held
    stream = LayerStream(
        model, windows, dtype=dtype, device=device, batch_size=batch_size, experts=experts, max_memory=limit, held=held,
        in_place=bool(asks.get("copies")), meter=meter,
    )  # fmt: skip
    stream.placement = found
    return stream


def default_dtype(model: Model, device: torch.device) -> torch.dtype:
    """float32 on the CPU, elsewhere the checkpoint's own dtype."""
    return torch.float32 if device.type == "cpu" else TORCH_DTYPES[model.dtype]


def pick_device(word: str) -> torch.device:
    """`auto`, `cpu` or `cuda` -> a device. Raises UsageError for cuda where there is none."""
    if word == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if word == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device", hint="Pass --device cpu.")
    return torch.device(word)


def layer_bytes(model: Model, layer: int) -> int:
    """Bytes on disk of one decoder layer."""
    return sum(model.checkpoint.tensors[name].nbytes for name, role in model.roles.items() if role.layer == layer)


def start_meter(meter: Meter, *models: Model) -> None:
    """Announce the layers of every model that will be streamed."""
    total = sum(layer_bytes(model, layer) for model in models for layer in range(model.num_layers))
    meter.start(total_bytes=total, parts=sum(model.num_layers for model in models), unit="layer")
