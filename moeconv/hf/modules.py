"""Modules that keep their weights packed and decode them in every forward pass: a family's experts, and linear
layers."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from moeconv.errors import InputError
from moeconv.hf.kernels import decode_four, type_of
from moeconv.hf.layout import STATE, Layout, Stock
from moeconv.plan.kernels.pack.fourbit import pack_nf4, read_quant_state, unnest_absmax
from moeconv.plan.kernels.pack.rowwise import decode_int8_rowwise, pack_int8_rowwise

Delta = tuple[Tensor, Tensor, float]  # left [experts, rows, r], right [experts, r, columns], and the product's scale


class PackedExperts(nn.Module):
    """A mixin for the experts class of a family: the attributes are the same, but the fused parameters are packed."""

    packed: dict[str, Layout]  # parameter name -> layout
    deltas: dict[str, list[Delta]]  # parameter name -> what active adapters add to the decoded weight
    dtype: torch.dtype  # of the model around it
    stock: type[nn.Module]  # the family's own class
    num_experts: int

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """`hidden_states` [tokens, hidden], `top_k_index` and `top_k_weights` [tokens, k], as in the stock class. A
        class that is called without an index (that of Llama 4) runs every expert on its share of the hidden states."""
        total = self.num_experts
        if top_k_index is None:
            every = torch.arange(total, device=hidden_states.device)
            return self.stock.forward(self._decoded(every, dtype=hidden_states.dtype), hidden_states)
        hit = torch.unique(top_k_index)
        hit = hit[hit < total]  # expert parallelism marks the tokens of other ranks with num_experts
        if not hit.numel():
            hit = torch.zeros(1, dtype=torch.long, device=top_k_index.device)
        if hit.numel() < total:
            # The used experts keep their order and get the numbers 0, 1, ..., so that the stock code sums in the same
            # order.
            slots = torch.full((total + 1,), hit.numel(), dtype=top_k_index.dtype, device=top_k_index.device)
            slots[hit] = torch.arange(hit.numel(), dtype=top_k_index.dtype, device=top_k_index.device)
            top_k_index = slots[top_k_index.clamp(max=total)]
        few = self._decoded(hit, dtype=hidden_states.dtype)
        return self.stock.forward(few, hidden_states, top_k_index, top_k_weights)

    def _decoded(self, hit: Tensor, *, dtype: torch.dtype) -> nn.Module:
        """An object of the stock class with only the experts `hit` int64 [n], decoded. A forward pass makes a new
        one."""
        few = object.__new__(self.stock)
        few.__dict__.update(self.__dict__)
        parameters: dict[str, Tensor | None] = {}
        for name, parameter in self._parameters.items():
            if name in self.packed:
                parameters[name] = self._decode(name, hit, dtype=dtype)
            elif parameter is not None and parameter.ndim and parameter.shape[0] == self.num_experts:
                parameters[name] = parameter.index_select(
                    0, hit
                )  # an unpacked tensor with one row per expert, such as a bias
            else:
                parameters[name] = parameter
        few.__dict__.update(_parameters=parameters, num_experts=hit.numel())
        return few

    def _decode(self, name: str, hit: Tensor, *, dtype: torch.dtype) -> Tensor:
        """The decoded experts `hit` of one parameter, [n, parts * out, in] in `dtype`, with the adapters added."""
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
    """A linear layer whose weight is packed, and decoded in every forward pass."""

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
    """Decode `count` experts: [count, parts * out, in] in `dtype`. `part(suffix)` returns their packed tensors."""
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
    four = functools.partial(decode_four, quant_map=part("_quant_map"), block_size=layout.block_size, dtype=dtype)
    if layout.count % layout.block_size == 0:
        values = four(octets.reshape(-1), absmax=absmax.reshape(-1), count=pieces * layout.count)
    else:  # the last block of every projection is shorter
        rows = zip(octets, absmax, strict=True)
        values = torch.stack([four(row, absmax=scales, count=layout.count) for row, scales in rows])
    return values.view(shape)


def encode(layout: Layout, weight: Tensor, *, quant_map: Tensor | None) -> dict[str, Tensor]:
    """The inverse of `decode`, rounded to the packed type: {suffix: tensor on the CPU} of `weight` [experts or 1,
    parts * out, in]. `quant_map` identifies the 4-bit type. Raises InputError for NaN or infinity."""
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


def _type_of(quant_map: Tensor | None) -> str:
    """The 4-bit type of a table of values. Raises InputError for other types, which can only be decoded."""
    kind = None if quant_map is None else type_of(quant_map)
    if kind is not None:
        return kind
    raise InputError(
        "this 4-bit type is neither NF4 nor FP4, so that weights cannot be packed into it",
        hint="First decode the model, by model.dequantize().",
    )


def weight_of(module: PackedExperts | PackedLinear, name: str, *, dtype: torch.dtype) -> Tensor:
    """The decoded weight `name` of a module: [experts, parts * out, in], or [out, in] of a linear layer."""
    layout = module.packed[name]
    weight = decode(
        layout, lambda suffix: getattr(module, name + suffix), count=max(1, layout.experts), dtype=dtype
    )  # fmt: skip
    return weight if layout.experts else weight[0]


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """The buffers of the module itself, by name."""
    return dict(module.named_buffers(recurse=False, remove_duplicate=False))


def put_weight(module: PackedExperts | PackedLinear, name: str, weight: Tensor) -> None:
    """Replace the weight `name` of a module by `weight`, in the shape of `weight_of`, rounded to the packed type."""
    layout = module.packed[name]
    for suffix, tensor in encode(layout, weight, quant_map=buffers_of(module).get(name + "_quant_map")).items():
        held: Stock = getattr(module, name + suffix)
        held.data = tensor.to(held.device)


def unpack(module: PackedExperts | PackedLinear, *, dtype: torch.dtype) -> None:
    """Turn a module back into the stock one, with its weights decoded to `dtype`."""
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
    """Move a module like any other, but keep the scales in float32 in a cast (`model.half()`), because they would be
    rounded."""
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
    """Replace a parameter on the meta device by its packed tensors, and the class of its module by the packed one."""
    path, _, name = target.rpartition(".")
    module: Stock = model.get_submodule(path)
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
        tensor: Stock = getattr(module, name + suffix)
        tensor._is_hf_initialized = True  # noqa: SLF001 (an offloaded tensor stays on meta, and must not be initialised again)
