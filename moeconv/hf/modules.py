"""Modules that keep their weights packed and decode them for every forward: a family's experts, and linear layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moeconv.errors import InputError
from moeconv.hf.layout import STATE, Layout
from moeconv.plan.kernels.pack.fourbit import decode_4bit, pack_nf4, read_quant_state, unnest_absmax
from moeconv.plan.kernels.pack.rowwise import decode_int8_rowwise, pack_int8_rowwise

Delta = tuple[Tensor, Tensor, float]  # left [experts, rows, r], right [experts, r, columns], and the product's scale


class PackedExperts(nn.Module):
    """Mixed in before a family's experts class: same attributes, but the fused parameters are packed."""

    packed: dict[str, Layout]  # parameter name -> layout
    deltas: dict[str, list[Delta]]  # parameter name -> what adapters add to the decoded weight at present
    dtype: torch.dtype  # of the model around it
    stock: type[nn.Module]  # the family's own class
    num_experts: int

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """`hidden_states` [tokens, hidden], `top_k_index` and `top_k_weights` [tokens, k], as in the stock class; a
        class that is given no index (Llama 4's) runs every expert on its share of the hidden states."""
        total = self.num_experts
        if top_k_index is None:
            every = torch.arange(total, device=hidden_states.device)
            return self.stock.forward(self._decoded(every, dtype=hidden_states.dtype), hidden_states)
        hit = torch.unique(top_k_index)
        hit = hit[hit < total]  # expert parallelism marks the tokens of other ranks with num_experts
        if not hit.numel():
            hit = torch.zeros(1, dtype=torch.long, device=top_k_index.device)
        if hit.numel() < total:
            # The hit experts in order, renumbered 0, 1, ...: the stock code sums in the same order as over all experts.
            slots = torch.full((total + 1,), hit.numel(), dtype=top_k_index.dtype, device=top_k_index.device)
            slots[hit] = torch.arange(hit.numel(), dtype=top_k_index.dtype, device=top_k_index.device)
            top_k_index = slots[top_k_index.clamp(max=total)]
        few = self._decoded(hit, dtype=hidden_states.dtype)
        return self.stock.forward(few, hidden_states, top_k_index, top_k_weights)

    def _decoded(self, hit: Tensor, *, dtype: torch.dtype) -> nn.Module:
        """A stand-in for this module that holds the experts `hit` [n] alone, decoded; made anew for every forward."""
        few = object.__new__(self.stock)
        few.__dict__.update(self.__dict__)
        parameters: dict[str, Any] = {}
        for name, parameter in self._parameters.items():
            if name in self.packed:
                parameters[name] = self._decode(name, hit, dtype=dtype)
            elif parameter is not None and parameter.ndim and parameter.shape[0] == self.num_experts:
                parameters[name] = parameter.index_select(0, hit)  # an unpacked tensor per expert, such as a bias
            else:
                parameters[name] = parameter
        few.__dict__.update(_parameters=parameters, num_experts=hit.numel())
        return few

    def _decode(self, name: str, hit: Tensor, *, dtype: torch.dtype) -> Tensor:
        """[n, parts * out, in] in `dtype`."""
        layout = self.packed[name]

        def chosen(suffix: str) -> Tensor:
            tensor = getattr(self, name + suffix)
            shared = suffix.endswith("_quant_map") or hit.numel() == layout.experts
            return tensor if shared else tensor.index_select(0, hit)

        weight = decode(layout, chosen, count=hit.numel(), dtype=dtype)
        for left, right, scale in self.deltas.get(name, ()):
            if hit.numel() < layout.experts:
                left, right = left.index_select(0, hit), right.index_select(0, hit)
            weight = torch.baddbmm(weight, left.to(dtype), right.to(dtype), alpha=scale)
        return weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return _keep_scales(self, super()._apply, fn, recurse)

    def extra_repr(self) -> str:
        return f"{', '.join(f'{name} {layout.scheme}' for name, layout in self.packed.items())}"


class PackedLinear(nn.Linear):
    """A linear layer whose weight is packed: the stock class's attributes, decoded for every forward."""

    packed: dict[str, Layout]
    deltas: dict[str, list[Delta]]
    dtype: torch.dtype
    stock: type[nn.Module] = nn.Linear

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`hidden_states` [..., in] -> [..., out]."""
        weight = decode(
            self.packed["weight"], lambda suffix: getattr(self, "weight" + suffix), count=1, dtype=hidden_states.dtype
        )
        return nn.functional.linear(hidden_states, weight[0], self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return _keep_scales(self, super()._apply, fn, recurse)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.packed['weight'].scheme}"


def decode(layout: Layout, part: Callable[[str], Tensor], *, count: int, dtype: torch.dtype) -> Tensor:
    """[count, parts * out, in] in `dtype`; `part` gives the tensors of `count` experts by their suffix."""
    shape = (count, layout.parts * layout.out, layout.columns)
    if layout.scheme == "int8":
        return decode_int8_rowwise(part(""), scb=part("_scb"), dtype=dtype).view(shape)
    pieces = count * layout.parts
    octets, absmax = part("").reshape(pieces, -1), part("_absmax").reshape(pieces, -1)
    if layout.nested:
        absmax = unnest_absmax(
            absmax,
            nested_absmax=part("_nested_absmax").reshape(pieces, -1),
            nested_quant_map=part("_nested_quant_map"),
            offset=part("_nested_offset").reshape(pieces),
        )
    four = functools.partial(decode_4bit, quant_map=part("_quant_map"), block_size=layout.block_size, dtype=dtype)
    if layout.count % layout.block_size == 0:
        values = four(octets.reshape(-1), absmax=absmax.reshape(-1), count=pieces * layout.count)
    else:  # every projection ends in a short block of its own
        rows = zip(octets, absmax, strict=True)
        values = torch.stack([four(row, absmax=scales, count=layout.count) for row, scales in rows])
    return values.view(shape)


def encode(layout: Layout, weight: Tensor, *, quant_map: Tensor | None) -> dict[str, Tensor]:
    """The inverse of `decode`, rounded to the packed type: `weight` [experts or 1, parts * out, in] -> the module's
    tensors by suffix, on the CPU. `quant_map` says which 4-bit type it is. Raises InputError for NaN or infinity."""
    rows = weight.detach().cpu().float().reshape(-1, layout.out, layout.columns)
    if layout.scheme == "int8":
        packed = [pack_int8_rowwise(piece) for piece in rows]
        made = {"": torch.cat([p[""] for p in packed]), "_scb": torch.cat([p["SCB"] for p in packed])}
    else:
        kind = _type_of(quant_map)
        packed = [pack_nf4(p, block_size=layout.block_size, quant_type=kind, nested=layout.nested) for p in rows]
        made = {"": torch.cat([p[""] for p in packed]), "_absmax": torch.cat([p["absmax"] for p in packed])}
        if layout.nested:
            states = [read_quant_state(p[STATE + kind]) for p in packed]
            made["_nested_absmax"] = torch.cat([p["nested_absmax"] for p in packed])
            made["_nested_offset"] = torch.tensor([state["nested_offset"] for state in states])
    return {suffix: tensor.view(layout.tensors[suffix][0]) for suffix, tensor in made.items()}


@functools.cache
def _maps() -> dict[str, Tensor]:
    return {kind: pack_nf4(torch.zeros(1, 64), quant_type=kind)["quant_map"] for kind in ("nf4", "fp4")}


def _type_of(quant_map: Tensor | None) -> str:
    for kind, values in _maps().items():
        if quant_map is not None and torch.equal(values, quant_map.cpu().float()):
            return kind
    raise InputError(
        "a 4-bit type that is neither NF4 nor FP4 is only decoded",
        hint="Decode the model first: model.dequantize().",
    )


def weight_of(module: PackedExperts | PackedLinear, name: str, *, dtype: torch.dtype) -> Tensor:
    """The whole weight `name` of a module, decoded: [experts, parts * out, in], or [out, in] of a linear layer."""
    layout = module.packed[name]
    weight = decode(
        layout, lambda suffix: getattr(module, name + suffix), count=max(1, layout.experts), dtype=dtype
    )  # fmt: skip
    return weight if layout.experts else weight[0]


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """The module's own buffers."""
    return dict(module.named_buffers(recurse=False, remove_duplicate=False))


def put_weight(module: PackedExperts | PackedLinear, name: str, weight: Tensor) -> None:
    """Pack `weight`, as `weight_of` gives it, in place of what the module holds; it is rounded to the packed type."""
    layout = module.packed[name]
    for suffix, tensor in encode(layout, weight, quant_map=buffers_of(module).get(name + "_quant_map")).items():
        held: Any = getattr(module, name + suffix)
        held.data = tensor.to(held.device)


def unpack(module: PackedExperts | PackedLinear, *, dtype: torch.dtype) -> None:
    """Make a module the stock one again, with its weights decoded to `dtype`."""
    for name, layout in module.packed.items():
        weight = weight_of(module, name, dtype=dtype)
        for suffix in layout.tensors:
            if suffix:
                delattr(module, name + suffix)
        setattr(module, name, nn.Parameter(weight, requires_grad=False))
    stock = module.stock
    del module.packed, module.deltas, module.dtype
    _become(module, stock)


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    module.__class__ = kind


def _keep_scales(
    module: PackedExperts | PackedLinear, apply: Callable[..., nn.Module], fn: Callable[[Tensor], Tensor], recurse: bool
) -> nn.Module:
    """Moves like every module; but a cast (`model.half()`) leaves the scales in float32, where they are exact."""
    before = buffers_of(module)
    apply(fn, recurse)
    module.dtype = fn(torch.empty(0, dtype=module.dtype)).dtype
    for name, new in buffers_of(module).items():
        if new.dtype != before[name].dtype:
            setattr(module, name, before[name].to(new.device))
    return module


_CLASSES: dict[type[nn.Module], type[PackedExperts]] = {}  # a family's own class -> the packed one


def _packed_class(stock: type[nn.Module]) -> type[PackedExperts]:
    if stock not in _CLASSES:
        _CLASSES[stock] = type(f"Packed{stock.__name__}", (PackedExperts, stock), {"stock": stock})
    return _CLASSES[stock]


def install(model: nn.Module, target: str, layout: Layout) -> None:
    """Replaces a parameter on the meta device by its packed tensors, and its module's class by the packed one."""
    path, _, name = target.rpartition(".")
    module: Any = model.get_submodule(path)
    if not isinstance(module, PackedExperts | PackedLinear):
        stock: type[nn.Module] = type(module)
        _become(module, _packed_class(stock) if layout.experts else PackedLinear)
        module.packed, module.deltas, module.dtype = {}, {}, model.dtype
    module.packed[name] = layout
    for suffix, (shape, dtype) in layout.tensors.items():
        empty = torch.empty(shape, dtype=dtype, device="meta")
        if suffix:
            module.register_buffer(name + suffix, empty)
        else:
            module.register_parameter(name, nn.Parameter(empty, requires_grad=False))
    for suffix in layout.tensors:
        tensor: Any = getattr(module, name + suffix)
        tensor._is_hf_initialized = True  # noqa: SLF001 (what is offloaded to disk stays on meta, and must not be drawn anew)
