"""Hooks into the stock forward pass: the arguments of the layers, and the inputs and outputs of their parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from torch import Tensor, nn

Arguments = tuple[tuple[object, ...], dict[str, object]]  # (args, kwargs) of one layer, without the hidden states
Calls = list[Arguments]  # one entry per layer


@contextmanager
def replaced(
    layers: nn.ModuleList, forward: Callable[[int, Tensor, tuple[object, ...], dict[str, object]], object]
) -> Iterator[None]:
    """Inside the block, the forward of every layer is `forward(index, hidden, args, kwargs)`. It is set on the layer's
    object, where it hides the method of the class, and removed afterwards."""
    for index, layer in enumerate(layers):
        layer.forward = lambda hidden, *args, _index=index, **kwargs: forward(_index, hidden, args, kwargs)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


class _AllLayersCalled(Exception):
    """Ends a forward pass after the last layer was called: nothing behind the layers has to be computed."""


def record_calls(
    decoder: nn.Module, layers: nn.ModuleList, ids: Tensor, *, returned: Callable[[Tensor], object]
) -> tuple[Tensor, Calls]:
    """Run the stock decoder over ids [b, S] without computing its layers. Returns the first layer's inputs [b, S, H]
    and the other arguments of every layer (masks, positions, rotary embeddings), which the stock code makes itself.
    `returned` makes what a layer of the class returns of hidden states."""
    first: list[Tensor] = []
    calls: Calls = []

    def record(index: int, hidden: Tensor, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        first.append(hidden)
        calls.append((args, kwargs))
        if index + 1 == len(layers):
            raise _AllLayersCalled
        return returned(hidden)

    with replaced(layers, record):
        with suppress(_AllLayersCalled):
            decoder(input_ids=ids, use_cache=False)
    return first[0], calls


def distinct_tensors(calls: Calls) -> list[Tensor]:
    """The distinct tensors among the arguments, in order. Layers share most of them."""
    found: dict[int, Tensor] = {}

    def collect(value: object) -> None:
        if isinstance(value, Tensor):
            found.setdefault(id(value), value)
        elif isinstance(value, (tuple, list)):
            for part in value:
                collect(part)
        elif isinstance(value, dict):
            collect(list(value.values()))

    collect(calls)
    return list(found.values())


def with_shared(value: object, kept: object) -> object:
    """`value`, with the tensors of `kept` where the two hold equal ones at the same place, so that each is kept once.

    `value` and `kept` are arguments that the same code gave to layers: nested tuples, lists and dictionaries.
    """
    if isinstance(value, Tensor):
        return kept if isinstance(kept, Tensor) and kept.shape == value.shape and kept.equal(value) else value
    if isinstance(value, dict) and isinstance(kept, dict):
        return {key: with_shared(part, kept.get(key)) for key, part in value.items()}
    if isinstance(value, (tuple, list)) and isinstance(kept, (tuple, list)) and len(value) == len(kept):
        return type(value)(with_shared(a, b) for a, b in zip(value, kept, strict=True))
    return value


@contextmanager
def captured(
    norm: nn.Module | None, ffn: nn.Module, router: nn.Module | None, experts: nn.Module | None, *, on_input: int = 0
) -> Iterator[dict[str, Tensor]]:
    """Hooks on the modules of one layer. After a forward pass in the block, the dictionary that it yields holds the
    tensors of a `layers.Batch` by their field.

    `on_input` is the top-k of a router whose weights multiply the experts' inputs. Such a router returns (weights
    [T, E], which are 0 where an expert is not chosen, logits), and its experts are called with neither. It is 0 for all
    other routers."""
    seen: dict[str, Tensor] = {}

    def flat(value: object) -> Tensor:
        tensor = value[0] if isinstance(value, tuple) else value
        assert isinstance(tensor, Tensor)
        return tensor.reshape(-1, tensor.shape[-1])

    def on_norm(_module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        given = (*args, *kwargs.values())[0]
        assert isinstance(given, Tensor)
        # residual streams may be in a dimension of their own
        seen.setdefault("residual", flat(given.flatten(2) if given.ndim > 2 else given))

    def on_ffn(_module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object], out: object) -> None:
        seen["ffn_input"], seen["ffn_output"] = flat(args or tuple(kwargs.values())), flat(out)
        seen.setdefault("residual", seen["ffn_input"])  # for families whose norm is behind the FFN
        seen.setdefault("expert_input", seen["ffn_input"])
        seen.setdefault("expert_output", seen["ffn_output"])

    def on_router(_module: nn.Module, _args: object, out: object) -> None:
        if on_input:
            seen["top_k_weights"], seen["top_k_index"] = flat(out).topk(on_input, dim=-1)
            assert isinstance(out, tuple)
            out = out[1]
        seen["router_logits"] = flat(out)

    def on_experts(_module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor], out: Tensor) -> None:
        given, seen["top_k_index"], seen["top_k_weights"] = (*args, *kwargs.values())[:3]
        seen["expert_input"], seen["expert_output"] = flat(given), flat(out)

    handles = [ffn.register_forward_hook(on_ffn, with_kwargs=True)]
    if norm is not None:
        handles.append(norm.register_forward_pre_hook(on_norm, with_kwargs=True))
    if router is not None and experts is not None:
        handles.append(router.register_forward_hook(on_router))
        if not on_input:
            handles.append(experts.register_forward_hook(on_experts, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
