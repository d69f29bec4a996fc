"""Modules that keep their weights packed and decode them for every forward: a family's experts, and linear layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moeconv.hf.layout import Layout
from moeconv.plan.kernels.pack.fourbit import decode_4bit, unnest_absmax
from moeconv.plan.kernels.pack.rowwise import decode_int8_rowwise


class PackedExperts(nn.Module):
    """Mixed in before a family's experts class: same attributes, but the fused parameters are packed."""

    packed: dict[str, Layout]  # parameter name -> layout
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

        return decode(layout, chosen, count=hit.numel(), dtype=dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return _keep_scales(self, super()._apply, fn, recurse)

    def extra_repr(self) -> str:
        return f"{', '.join(f'{name} {layout.scheme}' for name, layout in self.packed.items())}"


class PackedLinear(nn.Module):
    """A linear layer whose weight is packed: the stock class's attributes, decoded for every forward."""

    packed: dict[str, Layout]
    in_features: int
    out_features: int

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


def _keep_scales(
    module: nn.Module, apply: Callable[..., nn.Module], fn: Callable[[Tensor], Tensor], recurse: bool
) -> nn.Module:
    """Moves like every module; but a cast (`model.half()`) leaves the scales in float32, where they are exact."""
    before = dict(module._buffers)
    apply(fn, recurse)
    for name, old in before.items():
        new = module._buffers[name]
        if old is not None and new is not None and new.dtype != old.dtype:
            module._buffers[name] = old.to(new.device)
    return module


@functools.cache
def _packed_class(stock: type[nn.Module]) -> type[PackedExperts]:
    return type(f"Packed{stock.__name__}", (PackedExperts, stock), {"stock": stock})


def install(model: nn.Module, target: str, layout: Layout) -> None:
    """Replaces a parameter on the meta device by its packed tensors, and its module's class by the packed one."""
    path, _, name = target.rpartition(".")
    module: Any = model.get_submodule(path)
    if not isinstance(module, PackedExperts | PackedLinear):
        stock: Any = type(module)
        module.__class__ = _packed_class(stock) if layout.experts else PackedLinear
        module.packed = {}
    module.packed[name] = layout
    for suffix, (shape, dtype) in layout.tensors.items():
        empty = torch.empty(shape, dtype=dtype, device="meta")
        if suffix:
            module.register_buffer(name + suffix, empty)
        else:
            module.register_parameter(name, nn.Parameter(empty, requires_grad=False))
