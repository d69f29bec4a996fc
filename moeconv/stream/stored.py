"""A layer's experts as they are stored: decoded and widened a few at a time, when they are computed.

The parameters of the stock experts module stay on the meta device. A shallow copy of the module gets the weights of a
few experts and runs on the tokens of these experts only, so that the arithmetic is that of the stock code in every
family.
"""

from __future__ import annotations

import copy
import inspect
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moeconv.families.model import Model
from moeconv.families.packed import SHARED
from moeconv.stream.need import GROUP_BYTES
from moeconv.stream.skeleton import Skeleton, own_parameters
from moeconv.tensors import decode_read, plain_name, read_parts, read_rows

Parts = dict[str, dict[str, Tensor]]  # plain name -> part -> stored tensor


@dataclass(frozen=True)
class ExpertNames:
    """The plain names of a layer's expert tensors: `alone` per expert, `packed` those that hold all experts."""

    alone: tuple[tuple[str, ...], ...]
    packed: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.alone)

    def read(self, model: Model, first: int, stop: int) -> Parts:
        """The stored tensors of experts `first` to `stop`."""
        parts = {name: read_parts(model, name) for of_one in self.alone[first:stop] for name in of_one}
        return parts | {name: read_rows(model, name, first, stop, of=len(self)) for name in self.packed}

    def cut(self, parts: Parts, first: int, start: int, stop: int) -> Parts:
        """The part of `parts` (the stored tensors of experts from `first` on) of experts `start` to `stop`, as
        views."""
        alone = {name: parts[name] for of_one in self.alone[start:stop] for name in of_one}
        rows = slice(start - first, stop - first)
        return alone | {n: {key: part[rows] for key, part in parts[n].items()} for n in self.packed}


def names_of(model: Model, layer: int) -> ExpertNames | None:
    """The expert tensors of a layer; None where they cannot be split into experts."""
    alone: list[dict[str, None]] = [{} for _ in range(model.num_experts)]
    packed: dict[str, None] = {}
    for stored, role in model.roles.items():
        if role.layer != layer or role.group != "expert":
            continue
        if role.expert is not None:
            alone[role.expert][plain_name(stored, role)] = None
        elif role.part in SHARED or model.checkpoint.tensors[stored].shape[:1] != (model.num_experts,):
            return None
        else:
            packed[plain_name(stored, role)] = None
    return ExpertNames(tuple(map(tuple, alone)), tuple(packed))


@dataclass(eq=False)
class StoredExperts:
    """The weights of one layer's experts, kept apart from their stock module.

    Floating-point weights are in `fused` {parameter: [E, ...]}, in their dtype on disk. All others are in `raw` {first
    expert of a group: stored tensors}, or are read from the disk by `names` at every use. `down` (ascending experts,
    [n, ...] as the stock module holds them) replaces down projections. `size` is how many experts are widened at the
    same time.
    """

    stock: nn.Module
    model: Model
    skeleton: Skeleton
    names: ExpertNames
    size: int
    dtypes: Mapping[str, torch.dtype]
    fused: dict[str, Tensor] = field(default_factory=dict)
    raw: dict[int, Parts] = field(default_factory=dict)
    down: tuple[Sequence[int], Tensor] | None = None
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def groups(self) -> Iterator[tuple[int, int]]:
        """Yield (first, stop) of the experts that are widened at the same time."""
        for first in range(0, len(self.names), self.size):
            yield first, min(first + self.size, len(self.names))

    def weights(self, first: int, stop: int) -> dict[str, Tensor]:
        """{parameter: [stop - first, ...]} of experts of one group, in the dtype of the computation. The tensors are
        valid until the next call."""
        if self.fused:
            found = {leaf: self._widened(leaf, whole[first:stop]) for leaf, whole in self.fused.items()}
        else:
            start = first // self.size * self.size
            held = self.raw.get(start)
            parts = (
                self.names.read(self.model, first, stop) if held is None else self.names.cut(held, start, first, stop)
            )
            found = {leaf: self._widened(leaf, value) for leaf, value in self.leaves(parts, stop - first)}
        if self.down is not None:
            which, values = self.down
            rows = slice(bisect_left(which, first), bisect_left(which, stop))
            found["down_proj"][[e - first for e in which[rows]]] = values[rows].to(found["down_proj"].dtype)
        return found

    def _widened(self, leaf: str, value: Tensor) -> Tensor:
        """The values in the dtype of the computation, in memory that all groups reuse: new pages would cost more
        time."""
        held = self.buffers.get(leaf)
        if held is None:
            shape = (self.size, *value.shape[1:])
            held = self.buffers[leaf] = torch.empty(shape, dtype=self.dtypes[leaf], device=value.device)
        return held[: len(value)].copy_(value)

    def leaves(self, parts: Parts, count: int) -> Iterator[tuple[str, Tensor]]:
        """Yield (parameter, value) of the stock module, made from the stored tensors of `count` experts. Empties
        `parts`. Only what one parameter is made of is decoded at the same time."""
        of_parameter: dict[str, list[str]] = {}
        for name in parts:
            of_parameter.setdefault(self.skeleton.place(name), []).append(name)
        for names in of_parameter.values():
            tensors = {name: decode_read(self.model, name, parts.pop(name)) for name in names}
            yield from converted(self.skeleton, self.stock, tensors, count).items()

    def module(self, first: int, stop: int) -> nn.Module:
        """A stock module that holds only the experts `first` to `stop`, numbered from 0. It is valid until the next
        call, which reuses its memory."""
        return module_of(self.stock, self.weights(first, stop), of=len(self.names))

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The stock module's output, in the shape of `hidden` [..., H], for `top_k_index` and `top_k_weights` [T, k].
        The sum over a token's experts is in ascending order, as in the eager stock code."""
        flat, k = hidden.reshape(-1, hidden.shape[-1]), top_k_index.shape[-1]
        expert, order = top_k_index.reshape(-1).sort(stable=True)
        total, weights = torch.zeros_like(flat), top_k_weights.reshape(-1)
        for first, stop, rows in self.pairs(expert):
            pair = order[rows]
            token = pair // k
            given = flat[token], expert[rows, None] - first, weights[pair, None]
            total.index_add_(0, token, class_forward(self.module(first, stop))(*given).to(total.dtype))
        return total.view(hidden.shape)

    def forward_each(self, hidden: Tensor) -> Tensor:
        """The output [E * T, H] of a stock module that takes all T tokens for every expert, each multiplied by its
        routing weight. Rows of zeros are the tokens of other experts, and are not computed."""
        every = hidden.view(len(self.names), -1, hidden.shape[-1])
        rows = (every != 0).any(-1).flatten().nonzero().flatten()
        total, expert = torch.zeros_like(hidden), rows // every.shape[1]
        for first, stop, part in self.pairs(expert):
            total[rows[part]] = unweighted(self.module(first, stop), hidden[rows[part]], expert[part] - first)
        return total

    def attach(self) -> None:
        """Let the stock module compute with these weights."""
        forward = self.forward if takes_index(self.stock) else self.forward_each
        vars(self.stock).update(stored=self, forward=forward)

    def pairs(self, expert: Tensor) -> Iterator[tuple[int, int, slice]]:
        """Yield (first, stop, rows) for every group of experts that occurs in `expert` int64 [n], which must be
        ascending."""
        bounds = torch.tensor([[first, stop] for first, stop in self.groups()], device=expert.device)
        for (first, stop), (start, end) in zip(bounds.tolist(), torch.searchsorted(expert, bounds).tolist()):
            if end > start:
                yield first, stop, slice(start, end)


def converted(skeleton: Skeleton, stock: nn.Module, tensors: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """{parameter of a stock experts module: [count, ...]}, made from the tensors of `count` experts, named as on disk.
    Empties `tensors`. `stock` is without weights while this runs."""
    prefix, whole = skeleton.name_of(stock) + ".", own_parameters(stock)
    for leaf, p in whole.items():  # some conversions read the shape of the parameter that they build
        setattr(stock, leaf, nn.Parameter(torch.empty(count, *p.shape[1:], device="meta"), False))
    try:
        made = skeleton.convert(tensors)
    finally:
        for leaf, p in whole.items():
            setattr(stock, leaf, p)
    return {name.removeprefix(prefix): value for name, value in made.items()}


def module_of(stock: nn.Module, weights: Mapping[str, Tensor], *, of: int) -> nn.Module:
    """A stock module with the parameters `weights` {leaf: [n, ...]} of n of its `of` experts, numbered from 0."""
    part, count = copy.copy(stock), len(next(iter(weights.values())))
    held = {leaf: nn.Parameter(value, False) for leaf, value in weights.items()}
    counts = {key: count for key, n in vars(part).items() if type(n) is int and n == of and "expert" in key}
    vars(part).update(counts, _parameters=held)
    vars(part).pop("forward", None)
    return part


def _arguments(experts: nn.Module) -> int:
    """How many arguments the forward of a stock experts module takes."""
    return len(inspect.signature(type(experts).forward).parameters) - 1


def takes_index(experts: nn.Module) -> bool:
    """Whether a stock experts module takes the index of the experts and their weights, and not the hidden states of
    every expert, which are multiplied by the weights already."""
    return _arguments(experts) > 1


def is_transposed(experts: nn.Module) -> bool:
    """Whether the parameters of a stock experts module are [in, out]. A module that takes the hidden states of every
    expert multiplies them from the left by batched products, and has no attribute that says so."""
    return bool(getattr(experts, "is_transposed", not takes_index(experts)))


def unweighted(module: nn.Module, hidden: Tensor, expert: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """The output [n, H] of one expert per row of `hidden` [n, H], from the code of the stock module. `expert` int64 [n]
    are numbers of the module's experts. `dtype` is the dtype of the routing weights that the module expects."""
    if takes_index(module):
        ones = torch.ones(len(hidden), 1, dtype=dtype or hidden.dtype, device=hidden.device)
        return class_forward(module)(hidden, expert[:, None], ones).reshape(hidden.shape)
    made, whole = torch.empty_like(hidden), own_parameters(module)
    of = len(next(iter(whole.values())))
    for e in expert.unique().tolist():
        one = module_of(module, {leaf: p.detach()[e : e + 1] for leaf, p in whole.items()}, of=of)
        made[expert == e] = class_forward(one)(hidden[expert == e])
    return made


def class_forward(experts: nn.Module) -> Callable[..., Tensor]:
    """The forward of the module's class, even where the object has another one."""
    return type(experts).forward.__get__(experts)


def stored_in(experts: nn.Module) -> StoredExperts | None:
    """The stored experts of a module, if its experts are not in its parameters."""
    return vars(experts).get("stored")


def place(skeleton: Skeleton, experts: nn.Module, names: ExpertNames, *, in_place: bool, held: bool) -> bool:
    """Give a stock experts module its weights. Returns False, and does nothing, where they cannot be split by expert.

    With `in_place` they become ordinary parameters in the dtype and on the device of the computation. Otherwise they
    stay as they are stored: in memory, or with `held` False on the disk. They become ordinary parameters in any case
    where that takes no more memory, where they are small, or where the computation is not on the CPU.
    """
    leaves = dict(experts.named_parameters())
    if not _separable(skeleton.model, experts, leaves, len(names)):
        return False
    dtypes = {leaf: p.dtype for leaf, p in leaves.items()}
    wide = sum(p[0].numel() * p.dtype.itemsize for p in leaves.values())  # bytes of one widened expert
    size = max(1, GROUP_BYTES // max(1, wide))
    stored = StoredExperts(experts, skeleton.model, skeleton, names, size, dtypes)
    one = dict(stored.leaves(names.read(skeleton.model, 0, 1), 1))
    if {leaf: value.shape for leaf, value in one.items()} != {n: (1, *p.shape[1:]) for n, p in leaves.items()}:
        return False
    floats = _plain_floats(skeleton.model, names)
    saves_memory = not floats or any(one[leaf].dtype.itemsize < dtype.itemsize for leaf, dtype in dtypes.items())
    small = wide * len(names) <= GROUP_BYTES
    if in_place or small or skeleton.device.type != "cpu" or not saves_memory:
        for leaf, value in _fuse(stored, leaves, dtypes).items():
            setattr(experts, leaf, nn.Parameter(value, False))
        return True
    if held and floats:
        stored.fused = _fuse(stored, leaves, {leaf: value.dtype for leaf, value in one.items()})
    elif held:
        stored.raw = {first: names.read(skeleton.model, first, stop) for first, stop in stored.groups()}
    stored.attach()
    return True


def _separable(model: Model, experts: nn.Module, leaves: Mapping[str, nn.Parameter], count: int) -> bool:
    """Whether a stock module of `count` experts can run on a few of them: its parameters have one entry per expert, and
    its forward takes the hidden states, the index and the weights, which multiply the experts' outputs; or, where the
    weights multiply the inputs, the hidden states of every expert."""
    by_expert = all("." not in leaf and p.shape[:1] == (count,) for leaf, p in leaves.items())
    return by_expert and _arguments(experts) == (1 if model.weighs_inputs else 3)


def _plain_floats(model: Model, names: ExpertNames) -> bool:
    """Whether all tensors are stored as floating-point numbers, so that none needs decoding."""
    every = (*names.packed, *(name for of_one in names.alone for name in of_one))
    tensors = model.checkpoint.tensors
    return all(name in tensors and tensors[name].dtype in ("F64", "F32", "BF16", "F16") for name in every)


def _fuse(
    stored: StoredExperts, leaves: Mapping[str, nn.Parameter], dtypes: Mapping[str, torch.dtype]
) -> dict[str, Tensor]:
    """{parameter: [E, ...]}, filled group by group from the disk."""
    device = stored.skeleton.device
    fused = {leaf: torch.empty(p.shape, dtype=dtypes[leaf], device=device) for leaf, p in leaves.items()}
    for first, stop in stored.groups():
        for leaf, value in stored.leaves(stored.names.read(stored.model, first, stop), stop - first):
            fused[leaf][first:stop].copy_(value)
    return fused
