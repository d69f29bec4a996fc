"""The experts of one layer while their codes are chosen: in memory once, with their weights replaced by the coded
ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from threading import Lock
from types import MappingProxyType

import torch
from torch import Tensor, nn

from moeconv.errors import InputError, escape
from moeconv.families.model import Model
from moeconv.plan.plan import Item
from moeconv.quantize.gptq.groups import weight_name
from moeconv.stream.layer import Layer
from moeconv.stream.layers import LayerStream
from moeconv.stream.skeleton import Skeleton, own_parameters
from moeconv.stream.stored import converted, module_of
from moeconv.tensors import all_finite, decode_weight, packed_source

_COUNTED = 256  # rows that are converted to float64 at a time


class LayerExperts:
    """The experts of one layer. `module` has the parameters [E, ...] in the dtype of the computation. Weights are named
    as in `view`. `weight_of` returns the source's weight of a name, [out, in]. `replaced` are the names of the
    weights that will be replaced."""

    def __init__(
        self,
        view: Model,
        skeleton: Skeleton,
        stock: nn.Module,
        *,
        layer: int,
        replaced: Collection[str],
        weight_of: Callable[[str], Tensor],
    ) -> None:
        if not hasattr(stock, "down_proj"):
            raise InputError(
                f"--method gptq needs the experts' down_proj, and {type(stock).__name__} of transformers has none",
                hint="Use --method rtn or mse.",
            )
        self._skeleton, self._stock, self._weight_of, self._replaced = skeleton, stock, weight_of, {*replaced}
        self._names: dict[int, dict[str, list[str]]] = {}  # expert -> parameter -> names of its parts
        for name, role in view.roles.items():
            if (role.layer, role.group) == (layer, "expert"):
                of_one = self._names.setdefault(int(role.expert or 0), {})
                of_one.setdefault(skeleton.place(name), []).append(name)
        self._expert = {
            name: e for e, of_one in self._names.items() for of_place in of_one.values() for name in of_place
        }
        # a separate module, because the stock one has no weights while some are converted
        self.module = module_of(stock, own_parameters(stock), of=len(self._names))
        self._waiting: dict[str, Tensor] = {}
        self._lock = Lock()

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Replace weights. A weight that is one part of a fused parameter waits until all replaced parts of that
        parameter and expert are there."""
        self._waiting |= weights
        ready: dict[str, list[int]] = {}
        for e in sorted({self._expert[name] for name in weights}):
            for place, names in self._names[e].items():
                due = self._replaced & {*names}
                if due and due <= self._waiting.keys():
                    ready.setdefault(place, []).append(e)
        for place, experts in ready.items():
            names = [name for e in experts for name in self._names[e][place]]
            new = {n: self._waiting.pop(n) if n in self._waiting else self._wide(n) for n in names}
            for leaf, value in self._converted(new, len(experts)).items():
                own_parameters(self.module)[leaf][torch.tensor(experts)] = value.to(self._skeleton.dtype)

    def _wide(self, name: str) -> Tensor:
        return self._weight_of(name).to(self._skeleton.device, torch.float32)

    def names(self, expert: int) -> list[str]:
        """The names of an expert's weights."""
        return [name for of_place in self._names[expert].values() for name in of_place]

    def source(self, experts: Sequence[int], *, times: Mapping[str, float] = MappingProxyType({})) -> nn.Module:
        """A module with some of the experts as in the source, numbered from 0 in ascending order. The weights that
        `times` names are multiplied by a factor."""
        weights = {name: self._weight_of(name) for e in experts for name in self.names(e)}
        made = self._converted(
            {name: w * times[name] if name in times else w for name, w in weights.items()}, len(experts)
        )
        wide = {leaf: value.to(self._skeleton.device, self._skeleton.dtype) for leaf, value in made.items()}
        return module_of(self._stock, wide, of=len(self._names))

    def _converted(self, weights: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        with self._lock:
            return converted(self._skeleton, self._stock, weights, count)

    def outputs(self, given: Sequence[Tensor], rows: Tensor) -> Tensor:
        """The weighted sum [n, H] of the experts' outputs for the `rows` int64 [n] of `given` (inputs [T, H], index and
        weights [T, k])."""
        made: Tensor = self.module(*(x[rows].to(self._skeleton.device) for x in given))
        return made


def squared_errors(made: Tensor, wanted: Tensor) -> Tensor:
    """The squared error of each row of [n, H], float64 [n]."""
    parts = zip(made.split(_COUNTED), wanted.split(_COUNTED), strict=True)
    return torch.cat([(one.double() - other.double()).square_().sum(1) for one, other in parts])


def squared_norms(rows: Tensor) -> Tensor:
    """The squared norm of each row of [n, H], float64 [n]."""
    return torch.cat([part.double().square_().sum(1) for part in rows.split(_COUNTED)])


def experts_of(model: Model, view: Model, stream: LayerStream, layer: Layer, items: Sequence[Item]) -> LayerExperts:
    """The experts of a layer. Weights that `items` do not pack are as in the model."""
    assert layer.experts is not None
    packs = {weight_name(item): item for item in items}

    def weight_of(name: str) -> Tensor:
        return packed_source(model.checkpoint, packs[name]) if name in packs else decode_weight(model, name)

    return LayerExperts(view, stream.skeleton, layer.experts, layer=layer.index, replaced=packs, weight_of=weight_of)


def check_finite(items: Sequence[Item], weights: Sequence[Tensor]) -> None:
    """Raises InputError for the first of the `weights` of `items` that holds NaN or infinite values."""
    for item, weight in zip(items, weights, strict=True):
        if not all_finite(weight):
            raise InputError(
                f"tensor {escape(item.inputs[0].tensor)!r} holds NaN or infinite values",
                hint="Repair or replace the source checkpoint.",
            )
