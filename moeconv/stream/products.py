"""Observes and replaces matrix products inside stock code, for which transformers has no interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LINEAR = (nn.functional.linear,)
_PLAIN = (*LINEAR, torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm)
# the products of all experts at once, in torch and in the fallback of transformers, which registers its own operator
_GROUPED = ("_grouped_mm", "grouped_mm", "grouped_mm_fallback")


def is_linear(function: object) -> bool:
    """Whether a function of torch is the one of a linear layer."""
    return function in LINEAR


def is_product(function: object) -> bool:
    """Whether a function of torch multiplies matrices: two, or those of all experts."""
    return function in _PLAIN or getattr(function, "__name__", "") in _GROUPED


class OnProducts(TorchFunctionMode):
    """Inside the block, `on_product(arguments, product)` is called for the result of every function that is `among` the
    products. The tensor that it returns replaces the product."""

    def __init__(
        self,
        on_product: Callable[[Sequence[Tensor], Tensor], Tensor],
        *,
        among: Callable[[object], bool] = is_product,
    ) -> None:
        super().__init__()
        self._on_product, self._among = on_product, among

    def __torch_function__(
        self,
        func: Callable[..., object],
        _types: object,
        args: Sequence[Tensor] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        out = func(*args, **(kwargs or {}))
        return self._on_product(args, out) if isinstance(out, Tensor) and self._among(func) else out


class StableSorts(TorchFunctionMode):
    """Inside the block, every sort keeps the order of equal values, which torch leaves open by default."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        _types: object,
        args: Sequence[Tensor] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        stable = {"stable": True} if func in (torch.sort, Tensor.sort) else {}
        return func(*args, **(dict(kwargs or {}) | stable))
