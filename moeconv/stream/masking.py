"""A stock layer that routes as if experts were gone, and parts of stock experts that no interface gives.

The router's logits of dropped experts become minus infinity where the stock router computes them, so that choice,
groups, normalisation and scaling stay the stock code of any family.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moeconv.errors import InputError
from moeconv.stream.products import LINEAR, OnProducts


def top_k_places(modules: Iterable[nn.Module], keys: Sequence[str]) -> list[tuple[Any, str]]:
    """Where the stock code reads its top-k: (object, attribute), the modules' own, else the config that they share."""
    found: list[tuple[Any, str]] = []
    configs: dict[int, Any] = {}
    for module in modules:
        if type(getattr(module, "top_k", None)) is int:
            found.append((module, "top_k"))
        configs[id(getattr(module, "config", None))] = getattr(module, "config", None)
    shared = [(config, key) for config in configs.values() for key in keys if type(getattr(config, key, None)) is int]
    return found or shared


@contextmanager
def routed_to(
    router: nn.Module,
    ffn: nn.Module,
    kept: Sequence[int],
    *,
    num_experts: int,
    biases: Sequence[Tensor] = (),
    top_k: int | None = None,
    top_k_keys: Sequence[str] = (),
) -> Iterator[None]:
    """Inside the block the router chooses among the `kept` experts alone, and `top_k` of them where that is given.
    `top_k_keys` are the config keys that say it, for routers that keep no number of their own.

    `biases` are the tensors [E] or [1, E] that the choice is corrected by: a dropped expert's entry must not win.
    """
    gone = torch.ones(num_experts, dtype=torch.bool, device=router.weight.device)  # type: ignore[arg-type]
    gone[list(kept)] = False
    stock = router.forward
    changed: list[tuple[Tensor, Tensor]] = []
    counts = top_k_places(ffn.modules(), top_k_keys) if top_k is not None else []
    before = [getattr(at, name) for at, name in counts]

    def masked(_given: Sequence[Any], logits: Tensor) -> Tensor:
        return logits.masked_fill(gone, -torch.inf) if logits.shape[-1] == len(gone) else logits

    def forward(*args: Any, **kwargs: Any) -> Any:
        with OnProducts(masked, functions=LINEAR):
            return stock(*args, **kwargs)

    router.forward = forward
    try:
        with torch.no_grad():
            for bias in biases if bool(gone.any()) else ():
                changed.append((bias, bias.clone()))
                bias.masked_fill_(gone.view(bias.shape), -torch.inf)
        for at, name in counts:
            setattr(at, name, top_k)
        yield
    finally:
        del router.forward
        with torch.no_grad():
            for bias, values in changed:
                bias.copy_(values)
        for (at, name), value in zip(counts, before):
            setattr(at, name, value)


def check_routed(index: Tensor, weights: Tensor, kept: Sequence[int], *, top_k: int | None, layer: int) -> None:
    """Raises InputError unless only `kept` experts got weight, and `top_k` slots were filled where that is given."""
    allowed = torch.isin(index, torch.tensor(list(kept), device=index.device))
    if not bool((allowed | (weights == 0)).all()) or (top_k is not None and index.shape[-1] != top_k):
        raise InputError(
            f"the router of layer {layer} cannot be run without experts: its stock code chose one that is left out",
            hint="Criteria that read statistics alone do not need it: leave out --refit, --curve and gates.",
        )
