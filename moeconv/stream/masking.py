"""Makes a stock layer route as if some experts had been removed.

The logits of removed experts become minus infinity at the place where the stock router computes them, so that the
choice, groups, normalisation and scaling remain the stock code of every family.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moeconv.errors import InputError
from moeconv.stream.products import OnProducts, is_linear


def top_k_places(modules: Iterable[nn.Module], keys: Sequence[str]) -> list[tuple[object, str]]:
    """The places where the stock code reads its top-k, as (object, attribute): attributes of the modules themselves, or
    of the config that they share where no module has one."""
    found: list[tuple[object, str]] = []
    configs: dict[int, object] = {}
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
    """Inside the block, the router chooses only among the `kept` experts, and `top_k` of them if that is given.
    `top_k_keys` are the config keys that hold the top-k, for routers that have no attribute of their own.

    `biases` are the tensors [E] or [1, E] that are added to the scores for the choice. Their entries of removed experts
    become minus infinity too, because a large bias would otherwise outweigh the masked score.
    """
    gone = torch.ones(num_experts, dtype=torch.bool, device=router.weight.device)  # type: ignore[arg-type]
    gone[list(kept)] = False
    stock = router.forward
    changed: list[tuple[Tensor, Tensor]] = []
    counts = top_k_places(ffn.modules(), top_k_keys) if top_k is not None else []
    before = [getattr(at, name) for at, name in counts]

    def masked(_arguments: Sequence[Tensor], logits: Tensor) -> Tensor:
        return logits.masked_fill(gone, -torch.inf) if logits.shape[-1] == len(gone) else logits

    def forward(*args: object, **kwargs: object) -> object:
        with OnProducts(masked, among=is_linear):
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
    """Raises InputError unless only `kept` experts have a weight, and each token has `top_k` experts if that is
    given."""
    allowed = torch.isin(index, torch.tensor(list(kept), device=index.device))
    if not bool((allowed | (weights == 0)).all()) or (top_k is not None and index.shape[-1] != top_k):
        raise InputError(
            f"the stock router of layer {layer} cannot be run as if experts were removed: it chose a removed expert",
            hint="Leave out --refit, --curve and the gates; criteria that only read statistics work without this.",
        )
