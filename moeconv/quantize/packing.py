"""The packing of a model with a scheme per layer: its items, its config.json, and the schemes of least error within a
budget of bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from moeconv.checkpoint.overlay import Overlay
from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.families.head import with_head
from moeconv.families.model import Model
from moeconv.families.spec import Role
from moeconv.families.written import written_config
from moeconv.options import PlanOptions, QuantizeOptions, parse_size
from moeconv.plan.arrange import arrange
from moeconv.plan.build import TORCH_NAMES, carry_all, whole
from moeconv.plan.casts import cast_first, in_dtype
from moeconv.plan.overlay import from_overlay
from moeconv.plan.plan import Input, Item, TensorSpec
from moeconv.quantize.budget import allocate, byte_budget, too_small
from moeconv.quantize.inputs import scale_item
from moeconv.quantize.joined_weights import joined
from moeconv.quantize.methods import apply_method
from moeconv.quantize.rest import Rest, patterns
from moeconv.quantize.spec import Format, Scheme
from moeconv.types import JsonObject

_tuple = tuple.__new__  # creates a named tuple faster than its class does


@dataclass(frozen=True)
class _Pattern:
    """The item that packs a weight. Those of equal weights, of which a large model has some hundred thousand, differ
    from it in names alone. `outputs` are (what follows the stem of the weight's name, the other fields)."""

    item: Item
    outputs: Sequence[tuple[str, tuple[Any, ...]]]

    def of(self, ref: TensorRef) -> Item:
        """The item that packs the equal weight `ref`."""
        stem, item = ref.name.removesuffix(".weight"), self.item
        outputs = tuple([_tuple(TensorSpec, (stem + suffix, *rest)) for suffix, rest in self.outputs])
        return Item(outputs, item.kernel, (Input(ref.name, *item.inputs[0][1:]),), item.params, item.changed)


def _pattern(ref: TensorRef, made: Sequence[Item]) -> _Pattern | None:
    """The pattern of the items that pack `ref`; None if it is not one item whose outputs are named after the weight."""
    stem, item = ref.name.removesuffix(".weight"), made[0]
    alone = len(made) == 1 and [n.tensor for n in item.inputs] == [ref.name]
    if not alone or not all(spec.name.startswith(stem) for spec in item.outputs):
        return None
    return _Pattern(item, [(spec.name[len(stem) :], spec[1:]) for spec in item.outputs])


@dataclass(frozen=True)
class Packing:
    """How the weights of a model are packed. `by_layer` has the scheme of each MoE layer, `scheme` is that of all other
    weights. `dtype` is that of the tensors that are not packed. `types` has the scheme of each tensor of a file of
    another kind, where it may differ from tensor to tensor."""

    model: Model
    format: Format
    scheme: Scheme
    by_layer: Mapping[int, Scheme]
    weights: Sequence[TensorRef]
    method: str
    dtype: str | None
    overlay: Overlay | None = None
    rest: Rest | None = None
    types: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def _rest(self) -> frozenset[str]:
        return frozenset() if self.rest is None else self.rest.names

    def at(self, ref: TensorRef) -> Scheme:
        """The scheme of one weight."""
        return self._of(self.model.roles[ref.name], ref.name)

    def _of(self, role: Role, name: str) -> Scheme:
        if self.rest is not None and name in self._rest:
            return self.rest.scheme
        return self.scheme if role.layer is None else self.by_layer.get(role.layer, self.scheme)

    def make(self, ref: TensorRef, scheme: Scheme) -> list[Item]:
        """The items that pack one weight; one item per expert for a tensor of all experts of a layer."""
        role, stored = self.model.roles[ref.name], ref
        if self.dtype not in (None, ref.dtype):
            ref = in_dtype(ref, str(self.dtype))
        if role.group == "expert" and role.expert is None:
            assert self.format.stack is not None
            made = self.format.stack(ref, scheme, role.key, self.model.num_experts)
        else:
            assert self.format.make is not None
            made = [self.format.make(ref, scheme, role.key)]
            if self.format.scheme(scheme.name).joined:
                made = [replace(item, inputs=(*item.inputs, *map(whole, self._beside(ref)))) for item in made]
        # what --rest packs is rounded to nearest where its scheme has no other method
        known = ref.name not in self._rest or self.method in self.format.methods_of(self.format.scheme(scheme.name))
        made = [apply_method(item, self.method if known else "rtn", self.format) for item in made]
        if ref is not stored:
            made = [cast_first(item, self.model.checkpoint.tensors) for item in made]
        return [*made, scale_item(ref, role)] if self.format.scheme(scheme.name).inputs else made

    def _beside(self, ref: TensorRef) -> list[TensorRef]:
        """The weights that an engine joins with a weight, in its dtype."""
        return [in_dtype(other, ref.dtype) for other in self._joined.get(ref.name, ())]

    @cached_property
    def _joined(self) -> Mapping[str, list[TensorRef]]:
        return joined(self.model, self.weights)

    def items(self) -> list[Item]:
        """The items of the output: every tensor of the source, with `weights` packed in their place."""
        chosen = {r.name for r in self.weights}
        patterns: dict[tuple[object, ...], _Pattern] = {}

        def make(ref: TensorRef) -> list[Item]:
            role = self.model.roles[ref.name]
            scheme = self._of(role, ref.name)
            like = (ref.dtype, ref.shape, role.key, scheme, ref.name in self._joined)
            if pattern := patterns.get(like):
                return [pattern.of(ref)]
            made = self.make(ref, scheme)
            if pattern := _pattern(ref, made):
                patterns[like] = pattern
            return made

        def packed(ref: TensorRef) -> list[Item] | None:
            if ref.name not in chosen:
                return None
            return make(ref)

        items, overlay = carry_all(self.model, dtype=self.dtype, replace=packed), self.overlay
        return items if overlay is None else [i for item in items for i in from_overlay(item, overlay)]

    def config(self, ignored: Sequence[str], *, scope: str) -> JsonObject:
        """config.json with the quantization_config of the format. `ignored` are the modules that are not packed."""
        make, merge = self.format.config, self.format.merge
        assert make is not None
        config = written_config(
            with_head(self.model), self.model.family, dtype=TORCH_NAMES[self.dtype] if self.dtype else None
        )
        plain = TORCH_NAMES[self.dtype or self.model.dtype]
        by_layer = {**self.by_layer, **dict.fromkeys(self.model.mtp_layers, self.scheme)} if self.by_layer else {}
        used = dict.fromkeys([*by_layer.values()] or [self.scheme])
        configs = {scheme: make(scheme, ignored, plain, scope) for scheme in used}
        if len(used) > 1:
            assert merge is not None  # schemes differ only in formats that can merge them
            config["quantization_config"] = merge(configs, by_layer)
        else:
            config["quantization_config"] = configs[next(iter(used))]
        if self.rest is not None:
            assert self.format.beside is not None  # --rest was refused otherwise
            other = make(self.rest.scheme, ignored, plain, scope)
            targets = patterns(self.model, self.rest.weights)
            config["quantization_config"] = self.format.beside(config["quantization_config"], other, targets)
        return config | dict.fromkeys(self.format.config_keys, config["quantization_config"])

    def parts(self) -> dict[str, int]:
        """The number of tensors that the plan must write per role. Those of the experts are counted from the geometry,
        and not from the tensors that were found."""
        counts: dict[str, int] = {}
        others = (ref for ref in self.weights if self.model.roles[ref.name].group != "expert")
        for ref in others:
            group = self.model.roles[ref.name].group
            counts[group] = counts.get(group, 0) + self._outputs(ref, self.at(ref))
        like = next(r for r in self.weights if self.model.roles[r.name].group == "expert")
        keys = [
            key for key in self.model.family.tensors.names if key.startswith("expert.") and not key.endswith("_bias")
        ]
        copies = 1 if self.model.roles[like.name].expert is None else self.model.num_experts
        schemes = [*self.by_layer.values()] + [self.scheme] * len(self.model.mtp_layers)
        return counts | {"expert": sum(self._outputs(like, scheme) for scheme in schemes) * copies * len(keys)}

    def _outputs(self, ref: TensorRef, scheme: Scheme) -> int:
        return sum(len(item.outputs) for item in self.make(ref, scheme))


def mix(
    packing: Packing,
    offers: Sequence[Sequence[Scheme]],
    importance: Mapping[int, float],
    *,
    options: QuantizeOptions,
    common: PlanOptions,
) -> Packing:
    """The packing with the schemes that have the least sum over the layers of error times importance within the budget,
    out of the first of the `offers` whose smallest schemes fit it. --max-bytes is a budget for the files, to the byte.
    Raises UsageError where none fits."""
    least = 0
    for schemes in offers:
        found = _mix(packing, schemes, importance, options=options, common=common)
        if isinstance(found, Packing):
            return found
        least = found
    raise too_small(options, least, sum(packing.model.numel(ref) for ref in packing.weights))


def _mix(
    packing: Packing, schemes: Sequence[Scheme], importance: Mapping[int, float], *, options: QuantizeOptions,
    common: PlanOptions,
) -> Packing | int:  # fmt: skip
    """`mix` for `schemes`; where these do not fit, the bytes that the smallest of them need."""
    model = packing.model
    of_layer: dict[int, list[TensorRef]] = {layer: [] for layer in model.moe_layers}
    for ref in packing.weights:
        of_layer[model.roles[ref.name].layer or 0].append(ref)
    total = sum(importance[layer] for layer in of_layer) or 1.0
    layers = [
        [
            (
                sum(item.nbytes for r in refs for item in packing.make(r, s)),
                importance[layer] / total * packing.format.scheme(s.name).errors[s.group],
            )
            for s in schemes
        ]
        for layer, refs in of_layer.items()
    ]

    def with_schemes(picked: Sequence[int]) -> Packing:
        return replace(packing, by_layer={layer: schemes[i] for layer, i in zip(of_layer, picked, strict=True)})

    def size(of: Packing) -> int:
        plain = replace(of, overlay=None)  # an overlay has codes of the final schemes, and changes no size
        return sum(shard.nbytes for shard in arrange(plain.items(), common, model.family))

    smallest = [min(range(len(row)), key=lambda i: row[i][0]) for row in layers]
    least = sum(row[i][0] for row, i in zip(layers, smallest))
    weights = sum(model.numel(ref) for ref in packing.weights)
    budget = byte_budget(options, weights=weights, beside=size(with_schemes(smallest)) - least)
    while True:
        picked = allocate(layers, budget)
        if picked is None:
            return least
        found = with_schemes(picked)
        if options.max_bytes is None:
            return found
        over = size(found) - parse_size(options.max_bytes, flag="--max-bytes")
        if over <= 0:
            return found
        budget -= over  # the headers became longer
