"""Looking into the stock forward: what layers are called with, and what their parts take and give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn

Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]  # (args, kwargs) per layer, without the hidden states


@contextmanager
def replaced(layers: nn.ModuleList, forward: Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Tensor]):
    """Inside the block every layer's forward is `forward(index, hidden, args, kwargs)`."""
    for index, layer in enumerate(layers):
        layer.forward = lambda hidden, *args, _index=index, **kwargs: forward(_index, hidden, args, kwargs)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


class _Enough(Exception):
    """The last layer has been called: what comes behind it is not needed."""


def record_calls(decoder: nn.Module, layers: nn.ModuleList, ids: Tensor) -> tuple[Tensor, Calls]:
    """Run the stock decoder over ids [b, S] without its layers. Returns the first layer's inputs [b, S, H], and what
    every layer is called with beside them."""
    first: list[Tensor] = []
    calls: Calls = []

    def record(index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        first.append(hidden)
        calls.append((args, kwargs))
        if index + 1 == len(layers):
            raise _Enough
        return hidden

    with replaced(layers, record):
        with suppress(_Enough):
            decoder(input_ids=ids, use_cache=False)
    return first[0], calls


def distinct_tensors(calls: Calls) -> list[Tensor]:
    """The different tensors among the arguments, in order; layers share most of them."""
    found: dict[int, Tensor] = {}

    def look(value: Any) -> None:
        if isinstance(value, Tensor):
            found.setdefault(id(value), value)
        elif isinstance(value, (tuple, list)):
            for part in value:
                look(part)
        elif isinstance(value, dict):
            look(list(value.values()))

    look(calls)
    return list(found.values())


@contextmanager
def captured(
    norm: nn.Module | None, ffn: nn.Module, router: nn.Module | None, experts: nn.Module | None, *, on_input: int = 0
) -> Iterator[dict[str, Any]]:
    """Hooks on the modules of one layer; the block's value holds a Batch's fields after a forward pass in it.

    `on_input` is the top-k of a router whose weights multiply the experts' inputs: it returns (weights [T, E], 0 where
    an expert is not chosen, logits), and its experts are called with neither."""
    seen: dict[str, Any] = {}

    def flat(value: Any) -> Tensor:
        tensor = value[0] if isinstance(value, tuple) else value
        return tensor.reshape(-1, tensor.shape[-1])

    def on_norm(_module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.setdefault("residual", flat(args or tuple(kwargs.values())))

    def on_ffn(_module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        seen["ffn_input"], seen["ffn_output"] = flat(args or tuple(kwargs.values())), flat(out)
        seen.setdefault("residual", seen["ffn_input"])  # families that normalise behind the FFN

    def on_router(_module: nn.Module, _args: Any, out: Any) -> None:
        if on_input:
            seen["top_k_weights"], seen["top_k_index"] = flat(out).topk(on_input, dim=-1)
            out = out[1]
        seen["router_logits"] = flat(out)

    def on_experts(_module: nn.Module, args: Any, kwargs: Any) -> None:
        _, seen["top_k_index"], seen["top_k_weights"] = (*args, *kwargs.values())[:3]

    handles = [ffn.register_forward_hook(on_ffn, with_kwargs=True)]
    if norm is not None:
        handles.append(norm.register_forward_pre_hook(on_norm, with_kwargs=True))
    if router is not None and experts is not None:
        handles.append(router.register_forward_hook(on_router))
        if not on_input:
            handles.append(experts.register_forward_pre_hook(on_experts, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
