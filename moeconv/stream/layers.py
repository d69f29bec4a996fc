"""The layer stream: runs a checkpoint of any size layer by layer, with the weights of one decoder layer in memory.

Masks, rotary embeddings and layer types come from the stock forward itself: it runs once over layers that only record
their arguments. While a layer computes, the system is asked to read the bytes of the next one into its cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from moeconv.errors import InputError, Unsupported, UsageError
from moeconv.families.model import Model
from moeconv.families.widths import why_not
from moeconv.plan.kernels.stored import SAFETENSORS_DTYPES, TORCH_DTYPES
from moeconv.plan.memory import configure_malloc
from moeconv.plan.meter import Meter, SilentMeter
from moeconv.stream.device import batch_within, room_on
from moeconv.stream.finite import check_finite
from moeconv.stream.hooks import Arguments, Calls, distinct_tensors, record_calls, replaced, with_shared
from moeconv.stream.layer import Layer
from moeconv.stream.memory import MAPPED, allocate, release_memory
from moeconv.stream.need import MemoryPlacement, Need, Workload, WorkloadFields, need_of, noted_placement, together
from moeconv.stream.ragged import Ragged
from moeconv.stream.share import Share
from moeconv.stream.skeleton import Skeleton
from moeconv.stream.stored import ExpertNames, names_of, place
from moeconv.tensors import decode_weight, plain_name, plain_names


class LayerStream:
    """A pass of a model over `windows` int64 [n, S], layer by layer. It holds the activations `hidden` [n, S, H] (on
    the CPU, in `dtype`) and the weights of one layer. Of `Ragged` sequences, it holds one [tokens, H] for all batches.

    Iterate `layers()` once, then `logits()` as often as needed. With `dtype` None, the dtype is float32 on the CPU and
    the checkpoint's own elsewhere. Activations of more than `max_memory` bytes are in an unnamed file that is mapped
    into memory. With `held` False, the experts of a large layer stay on disk and are read each time that they are
    computed. With `in_place`, the experts are ordinary parameters in `dtype`; otherwise they stay as they are stored.
    Every layer that is done is reported to `meter`.

    Raises InputError for token ids outside the vocabulary and for a checkpoint that does not load strictly.
    """

    def __init__(
        self,
        model: Model,
        windows: np.ndarray | Tensor | Ragged,
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
        self.ragged = windows if isinstance(windows, Ragged) else None
        self.share = Share.whole(0 if isinstance(windows, Ragged) else len(windows))
        self.windows = torch.as_tensor(windows.ids if isinstance(windows, Ragged) else windows, dtype=torch.int64)
        _check_passed_on(model)
        self.skeleton = Skeleton(model, dtype=self.dtype, device=self.device, experts=experts)
        self._names: dict[int | None, list[str]] = {}
        for name, layer in plain_names(model):
            self._names.setdefault(layer, []).append(name)
        self._check_ids()
        # by the first window and the number of windows of a batch
        self._calls: dict[tuple[int, int], Calls] = {}
        self.hidden = self._embed()
        self._next_layer = 0
        self._bytes = self._told = 0  # of the current layer, and how many of them were reported to the meter

    def skip_to(self, layer: int) -> None:
        """Start at this layer. The caller must have written the inputs of the layer to `hidden`."""
        self._next_layer = layer

    def rows(self) -> Iterator[slice]:
        """The batches, as slices of the windows."""
        if self.ragged is not None:
            yield from self.ragged.batches
            return
        for start in range(0, len(self.windows), self.batch_size):
            yield slice(start, min(start + self.batch_size, len(self.windows)))

    def batch(self, values: Tensor, rows: slice) -> Tensor:
        """The part [b, S, ...] of `values`, laid out as `hidden` or `windows`, that belongs to a batch of `rows()`."""
        return values[rows] if self.ragged is None else self.ragged.batch(values, rows)

    def layers(self) -> Iterator[Layer]:
        """Yield every decoder layer in order; its weights stay loaded until the next layer is requested. A layer that
        the caller did not run with `advance` is run at that point.
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
                self._bytes = layer_bytes(self.model, index)
                self._fill_layer(layer)
                if index + 1 < self.model.num_layers:
                    pool.submit(self.model.checkpoint.advise, self._stored_names(index + 1))
                yield layer
                if not layer.advanced:
                    layer.run_all()
                self.skeleton.empty(module)
                release_memory()
                self._next_layer = index + 1
                self._meter.advance(self._bytes - self._told)
                self._bytes = self._told = 0
                self._meter.part_done()

    def ran(self, rows: slice) -> None:
        """Report a batch of the current layer, so that the meter moves within layers that take long."""
        share = self._bytes * self.batch(self.windows, rows).numel() // self.windows.numel()
        self._told += share
        self._meter.advance(share)

    def arguments(self, rows: slice, layer: int) -> Arguments:
        """The arguments (args, kwargs) with which the stock model calls a layer for a batch, one of `rows()`, without
        the hidden states."""
        return self._calls[rows.start, rows.stop - rows.start][layer]

    def router_extras(self, layer: int) -> list[str]:
        """The names on disk of the tensors that a router adds to its scores for the choice."""
        of_layer = ((n, r) for n, r in self.model.roles.items() if r.layer == layer and r.group == "router")
        # an ordinary bias is already in the logits, and a scale does not affect the choice
        beside = ("router.weight", "router.bias", "router.scale")
        return [plain_name(name, r) for name, r in of_layer if r.key not in beside]

    def run(self) -> LayerStream:
        """Run all layers."""
        for _ in self.layers():
            pass
        return self

    def logits(self, *, batch_size: int = 1) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, logits [b, S, V]) from the stock final norm and output head, tied or not."""
        return ((rows, logits[0]) for rows, logits in self.tails([self.hidden], batch_size=batch_size))

    @torch.no_grad()
    def tails(self, flows: Sequence[Tensor], *, batch_size: int = 1) -> Iterator[tuple[slice, list[Tensor]]]:
        """Yield (rows, [logits [b, S, V] per flow]), for several final activations `flows` [n, S, H]."""
        with self.head_loaded():
            for start in range(0, len(self.windows), batch_size):
                rows = slice(start, min(start + batch_size, len(self.windows)))
                ids = self.windows[rows].to(self.device)
                yield rows, [self.tail(flow[rows].to(self.device), ids) for flow in flows]

    @contextmanager
    def head_loaded(self) -> Iterator[None]:
        """Inside the block, the final norm and the output head are loaded. Raises ValueError before all layers were
        run, and InputError where the checkpoint has no head."""
        if self._next_layer != self.model.num_layers:
            raise ValueError("the logits are known only after all layers were run")
        embedding = self._embedding_names()
        tied = bool(self.skeleton.module.all_tied_weights_keys)
        names = [n for n in self._names[None] if tied or n not in embedding]
        self._fill(names, under="")
        self.skeleton.tie()
        missing = [n for n, p in self.skeleton.head.named_parameters() if p.is_meta]
        if missing:
            raise InputError(
                "the checkpoint has no output embeddings", hint="A shard is missing: copy the checkpoint again."
            )
        try:
            yield
        finally:
            for child in (self.skeleton.head, *self.skeleton.decoder.children()):
                self.skeleton.empty(child)
            release_memory()

    def tail(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """The logits [b, S, V] of final hidden states [b, S, H] of the tokens `ids` [b, S], inside `head_loaded`."""
        embedding = self.skeleton.module.get_input_embeddings()
        embedding.forward = lambda _ids: hidden.new_zeros((*ids.shape, self.model.hidden_size))  # no layer reads them
        try:
            return self._after_layers(hidden, ids)
        finally:
            del embedding.forward

    def _after_layers(self, hidden: Tensor, ids: Tensor) -> Tensor:
        with replaced(
            self.skeleton.layers, lambda _index, _given, _args, _kwargs: self._returned(self.as_given(hidden))
        ):
            return self.skeleton.module(input_ids=ids, use_cache=False).logits

    def as_given(self, hidden: Tensor) -> Tensor:
        """Hidden states [b, S, H] as the class gives them to its layers: some have the residual streams in a dimension
        of their own, [b, S, streams, hidden_size]."""
        apart = self.model.family.layers.streams_apart
        return hidden.unflatten(-1, (-1, self.model.hidden_size)) if apart else hidden

    def _returned(self, hidden: Tensor) -> object:
        """What a layer of the class returns of hidden states: them alone, or also what it passes on."""
        return hidden if self.model.family.layers.passed_on is None else (hidden, None)

    # -- inside --------------------------------------------------------------------------------------------------

    def _check_ids(self) -> None:
        size = self.skeleton.module.get_input_embeddings().weight.shape[0]
        if self.windows.ndim != (2 if self.ragged is None else 1) or self.windows.numel() == 0:
            raise InputError("there are no tokens to run the model on", hint="Give more text.")
        low, high = int(self.windows.min()), int(self.windows.max())
        if low < 0 or high >= size:
            raise InputError(
                f"token id {high if high >= size else low} is outside the model's vocabulary of {size}",
                hint="The tokenizer files belong to another model: copy those of this model into its directory.",
            )

    def _stored_names(self, layer: int) -> list[str]:
        return [name for name, role in self.model.roles.items() if role.layer == layer]

    def _fill_layer(self, layer: Layer) -> None:
        """Load the weights of a layer: its experts as they are stored, everything else in the dtype of the
        computation."""
        under, names = self.skeleton.name_of(layer.module) + ".", self._names[layer.index]
        experts = names_of(self.model, layer.index) if layer.experts is not None else None
        if layer.experts is None or experts is None or not self._place(layer.experts, experts):
            return self._fill(names, under=under)
        placed = {*experts.packed, *(name for of_one in experts.alone for name in of_one)}
        beside = self.skeleton.name_of(layer.experts) + "."
        self._fill([name for name in names if name not in placed], under=under, beside=beside)

    def _place(self, experts: nn.Module, names: ExpertNames) -> bool:
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
        """The inputs [n, S, H] of the first layer. Also records the arguments of every layer, for each batch size."""
        embedding = self.skeleton.module.get_input_embeddings()
        self._fill(self._embedding_names(), under=self.skeleton.name_of(embedding) + ".")
        # trained parameters of the rotary embeddings, which the arguments of the layers contain
        self._fill([plain_name(n, r) for n, r in self.model.roles.items() if r.group == "rotary"], under="")
        hidden = allocate((*self.windows.shape, self.model.residual_size), self.dtype, self.max_memory)
        of_shape: dict[tuple[int, ...], Calls] = {}
        for rows in self.rows():
            ids = self.batch(self.windows, rows).to(self.device)
            first, calls = record_calls(self.skeleton.decoder, self.skeleton.layers, ids, returned=self._returned)
            self.batch(hidden, rows).copy_(first.flatten(2))
            # No mask is needed for padding, which is at the end, so masks and positions depend only on the shape of
            # the batch: one is kept per shape. Some classes also give their layers the tokens, which are small.
            kept = of_shape.setdefault(tuple(ids.shape), calls)
            self._calls[rows.start, len(first)] = cast("Calls", with_shared(calls, kept))
            known = set(map(id, distinct_tensors(kept)))
            own = [t for t in distinct_tensors(self._calls[rows.start, len(first)]) if id(t) not in known]
            if any(t.is_floating_point() or t.numel() > ids.numel() for t in own):
                raise InputError(
                    f"{self.model.family.model_type} cannot be run layer by layer: its layers take more from the "
                    "embedding of the tokens than the hidden states",
                    hint="The commands that run a model do not support this family; the others do.",
                )
        check_finite(self.model, hidden, layer=None)
        self.skeleton.empty(embedding)
        release_memory()
        return hidden

    def loaded(self, index: int) -> Layer:
        """A layer with its weights loaded, out of turn. The caller frees it."""
        layer = self._layer(index, self.skeleton.layers[index])
        self._fill_layer(layer)
        return layer

    def _layer(self, index: int, module: nn.Module) -> Layer:
        """The modules of a layer, found through its tensors: the module that holds a tensor is its owner, in any
        family."""
        first: dict[str, str] = {}
        before = self.model.family.layers.mixer or "norm.ffn"
        for name, role in self.model.roles.items():
            if role.layer == index:
                first.setdefault(
                    role.key if role.key in (before, "router.weight") else role.group, plain_name(name, role)
                )
        norm = self.skeleton.owner(first[before]) if before in first else None
        if index not in self.model.moe_layers:
            # of a layer without an FFN, the whole layer is observed
            ffn = self.skeleton.parent(self.skeleton.owner(first["ffn"])) if "ffn" in first else module
            return Layer(index, module, norm, ffn, None, None, self)
        router = self.skeleton.owner(first["router.weight"])
        experts = self.skeleton.owner(first["expert"])
        for _ in range(self.model.family.experts.modules_above):
            experts = self.skeleton.parent(experts)
        above = self.skeleton.parent(experts)
        # experts that are directly in the layer have no block around them, so they are observed alone
        return Layer(index, module, norm, experts if above is module else above, router, experts, self)


def stream_within(
    model: Model, windows: np.ndarray | Ragged, *, budget: int | None, what: str, meter: Meter,
    dtype: torch.dtype | None = None, device: str | torch.device = "cpu", batch_size: int = 8,
    beside: Sequence[Need] = (), **asks: Unpack[WorkloadFields],
) -> LayerStream:  # fmt: skip
    """A stream that takes at most `budget` bytes of memory, or without a budget at most what is free. Where the experts
    and the activations do not fit, they stay on the disk; the stream's `placement` records which of them do.

    The experts of a layer are computed all at once where the stock code can (`fast_experts`). `asks` are fields of
    `need.Workload`. `beside` are the needs of what else the process does, before or after.
    On another device than the CPU the budget is for the activations alone, and the batches are as large as its memory
    allows. Raises what `need.choose_placement` raises,
    before anything is read."""
    device = torch.device(device)
    dtype, limit, held, found = dtype or default_dtype(model, device), budget, True, None
    length = windows.longest if isinstance(windows, Ragged) else windows.shape[-1]
    run = Workload(windows.size, length, batch_size, dtype.itemsize, **asks)
    if device.type != "cpu":
        batch_size = batch_within(model, run, room_on(device), what=what)
    else:
        configure_malloc(MAPPED)
        found = noted_placement(together([need_of(model, run), *beside]), budget=budget, meter=meter, what=what)
        limit, held = found.activations, found.held
    stream = LayerStream(
        model, windows, dtype=dtype, device=device, batch_size=batch_size, experts=fast_experts(model, dtype),
        max_memory=limit, held=held, in_place=bool(asks.get("copies")), meter=meter,
    )  # fmt: skip
    stream.placement = found
    return stream


def _check_passed_on(model: Model) -> None:
    """Raises Unsupported for a model whose layers read more from other layers than the hidden states."""
    name, readers = model.family.layers.passed_on or ("", frozenset())
    found = [i for i, kind in enumerate(model.layer_kinds or ()) if kind in readers]
    if found:
        raise Unsupported(
            f"layer {found[0]} reads {name} of an earlier layer, so that the model cannot be run layer by layer",
            hint="Commands that run no model take it: prune without --data, and quantize without --data.",
        )


def fast_experts(model: Model, dtype: torch.dtype) -> str:
    """The implementation of the experts that computes a model fastest in `dtype`: the default of transformers, which
    takes all experts of a layer in one product, or where it cannot compute these sizes the loop over the experts."""
    if not model.num_experts or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "eager"
    name, hidden = SAFETENSORS_DTYPES[dtype], model.expert_dimension
    fits = why_not(model.family, width=model.expert_width, hidden=hidden, dtype=name) is None
    return model.family.experts.implementation if fits else "eager"


def default_dtype(model: Model, device: torch.device) -> torch.dtype:
    """float32 on the CPU, elsewhere the checkpoint's own dtype."""
    return torch.float32 if device.type == "cpu" else TORCH_DTYPES[model.dtype]


def layer_bytes(model: Model, layer: int) -> int:
    """Bytes on disk of one decoder layer."""
    return sum(model.checkpoint.tensors[name].nbytes for name, role in model.roles.items() if role.layer == layer)


def start_meter(meter: Meter, *models: Model, tokens: int) -> None:
    """Announce to the meter the layers of all models that will be run on `tokens` tokens each."""
    total = sum(layer_bytes(model, layer) for model in models for layer in range(model.num_layers))
    meter.start(
        total_bytes=total, parts=sum(model.num_layers for model in models), unit="layer", tokens=tokens * len(models)
    )
