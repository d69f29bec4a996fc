"""Single experts of a stock experts module, whatever its layout: their outputs, activations and down projections."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moeconv.errors import InputError


def one_expert(forward: Callable[..., Tensor], hidden: Tensor, expert: int, *, like: Tensor | None = None) -> Tensor:
    """Output [n, H] of one expert for `hidden` [n, H], through the stock experts' `forward`, whatever its layout."""
    index = torch.full((len(hidden), 1), expert, dtype=torch.int64, device=hidden.device)
    ones = torch.ones(len(hidden), 1, dtype=like.dtype if like is not None else hidden.dtype, device=hidden.device)
    return forward(hidden, index, ones).reshape(hidden.shape)


class _LastProduct(TorchFunctionMode):
    """Remembers what the last matrix product inside it multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.left: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            self.left = args[0]
        return func(*args, **(kwargs or {}))


_PRODUCTS = (nn.functional.linear, torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm)


def activations(experts: nn.Module, hidden: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """What an expert's down projection reads, [n, I], and the expert's output [n, H], for `hidden` [n, H]."""
    with _LastProduct() as seen:
        output = one_expert(type(experts).forward.__get__(experts), hidden, expert)
    width = down_projection(experts, expert).shape[1]
    if seen.left is None or seen.left.shape != (len(hidden), width):
        raise InputError(
            "the experts of this family are not computed as a product with down_proj at the end",
            hint="Leave out --refit and --merge.",
        )
    return seen.left.detach(), output


def down_projection(experts: nn.Module, expert: int) -> Tensor:
    """An expert's down projection as a view [H, I]. Raises InputError where the class of transformers has none."""
    if not hasattr(experts, "down_proj"):
        raise InputError(
            f"{type(experts).__name__} of transformers keeps no down_proj of its experts, which this computes with",
            hint="Leave out --refit and --merge.",
        )
    down = experts.down_proj[expert]  # type: ignore[index]
    return down.T if getattr(experts, "is_transposed", False) else down


@contextmanager
def with_down(experts: nn.Module, replaced: Mapping[int, Tensor]) -> Iterator[None]:
    """Inside the block the experts' down projections are the given [H, I] ones."""
    before = {e: down_projection(experts, e).clone() for e in replaced}
    with torch.no_grad():
        for e, values in replaced.items():
            down_projection(experts, e).copy_(values)
    try:
        yield
    finally:
        with torch.no_grad():
            for e, values in before.items():
                down_projection(experts, e).copy_(values)
