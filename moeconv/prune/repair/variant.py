"""One way to prune a model, as it runs beside the unpruned one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moeconv.prune.repair.heal import Heal, Healed, HealOutcome
from moeconv.prune.repair.narrow import NarrowOutcome
from moeconv.prune.repair.refit import Refit, RefitOutcome
from moeconv.stream.layer import Layer

Choose = Callable[[Layer, Tensor], Sequence[int]]  # a layer, its inputs in the variant [n, S, H] -> experts to keep
OnHealed = Callable[[Layer, Healed], None]  # a layer, what became of it
OnLayer = Callable[[int, Sequence[int], Tensor], None]  # layer, experts in ascending order, down projections [n, H, I]
Downs = tuple[Sequence[int], Tensor]  # experts in ascending order, their down projections [n, H, I]


@dataclass(eq=False)
class Variant:
    """One way to prune. `keep` {layer: kept experts} (a layer that is absent keeps all), or `choose`, which decides for
    each layer when the pass reaches it.

    `replace` {layer: (experts, down projections [n, H, I])} are weights that were already changed. `scale` {layer:
    factor} multiplies the down projections of the experts. `refit` computes new down projections, which are used where
    they are clearly better than the old ones on held-out tokens; `fitted` records the result. `on_layer` is called with
    the new down projections of each layer. With `width`, every expert keeps only that many neurons: `neurons` {layer:
    [n, width]} are their numbers, and the columns of all others in its down projection become 0; `narrowed` records
    the result. In a dense model, it is the width of the FFNs, which are the expert 0. The shared expert keeps `shared`
    neurons (None: as `width` has it), before the experts are cut and refitted: `shared_neurons`, `shared_narrowed` and
    `shared_fitted` are its results, and `on_shared` is called with its new down projections. `top_k` is the number of
    experts per token, instead of the model's own.
    With `heal`, the kept experts and the router of each layer are trained after the refit; `healed` records the
    results, and `on_healed` is called with every layer. After the pass, `hidden` [n, S, H] are the final activations of
    the variant, and `keep` has an entry for every layer.
    """

    keep: dict[int, Sequence[int]] = field(default_factory=dict)
    choose: Choose | None = None
    refit: Refit | None = None
    width: int | None = None
    shared: int | None = None
    top_k: int | None = None
    replace: Mapping[int, Downs] = field(default_factory=dict)
    scale: Mapping[int, float] = field(default_factory=dict)
    on_layer: OnLayer | None = None
    heal: Heal | None = None
    healed: list[HealOutcome] = field(default_factory=list)
    on_healed: OnHealed | None = None
    fitted: list[RefitOutcome] = field(default_factory=list)
    neurons: dict[int, Tensor] = field(default_factory=dict)
    narrowed: list[NarrowOutcome] = field(default_factory=list)
    on_shared: OnLayer | None = None
    shared_neurons: dict[int, Tensor] = field(default_factory=dict)
    shared_narrowed: list[NarrowOutcome] = field(default_factory=list)
    shared_fitted: list[RefitOutcome] = field(default_factory=list)
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
