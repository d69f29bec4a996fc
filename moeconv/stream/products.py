"""Observes and replaces matrix products inside stock code, for which transformers has no interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LINEAR = (nn.functional.linear,)
PRODUCTS = (*LINEAR, torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm)


class OnProducts(TorchFunctionMode):
    """Inside the block, `on_product(arguments, product)` is called for every product that one of `functions` computes.
    The tensor that it returns replaces the product."""

    def __init__(
        self,
        on_product: Callable[[Sequence[Tensor], Tensor], Tensor],
        *,
        functions: Sequence[Callable[..., Tensor]] = PRODUCTS,
    ) -> None:
        super().__init__()
        self._on_product, self._functions = on_product, functions

    def __torch_function__(
        self,
        func: Callable[..., object],
        _types: object,
        args: Sequence[Tensor] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        out = func(*args, **(kwargs or {}))
        return self._on_product(args, out) if func in self._functions and isinstance(out, Tensor) else out
