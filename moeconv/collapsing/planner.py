"""The plan of a dense model made of a Mixture-of-Experts. Imports no torch and reads no tensor bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from moeconv.checkpoint.header import tensor_nbytes
from moeconv.checkpoint.overlay import Layout, Overlay
from moeconv.collapsing.width import DenseWidth, dense_width
from moeconv.errors import InputError, UsageError
from moeconv.families.backwards import check_twin, dense_twins, draft_dense
from moeconv.families.folds import Draft
from moeconv.families.model import Model
from moeconv.families.node import Node, concat, fill, transpose
from moeconv.families.shapes import shape_of
from moeconv.families.spec import FFN_PARTS, Family, Pair
from moeconv.families.target import whole_config
from moeconv.families.written import other_values_elsewhere
from moeconv.options import CollapseOptions, PlanOptions, parameters_of
from moeconv.plan.arrange import arrange
from moeconv.plan.build import TORCH_NAMES, count_planned, parse_dtype
from moeconv.plan.overlay import ORIGIN, fingerprint
from moeconv.plan.plan import Input, Item, Plan, TensorSpec
from moeconv.plan.planned import planned_model
from moeconv.types import JsonObject
from moeconv.upcycle.cut import Cut
from moeconv.upcycle.outside_ffn import OutsideFfn
from moeconv.upcycle.sources import Sources
from moeconv.upcycle.target_tensors import Placed, TargetTensors

_SEE = "See the manual of collapse for the families that can be collapsed."
_ON_DATA = ("surgeon", "energy")
_FFN = ("expert", "shared", "ffn")  # groups of tensors of which the FFNs are made


@dataclass(frozen=True)
class Collapse:
    """The conversion of `model` to the dense family of `pair`, with FFNs of `width` neurons."""

    model: Model
    pair: Pair
    draft: Draft
    width: DenseWidth
    dtype: str | None  # of the output; None: that of the source

    @property
    def target(self) -> Family:
        return self.draft.target

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers whose experts become one FFN."""
        return self.model.moe_layers

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """The matrices of an FFN: gate (where it has one), up and down."""
        return tuple(part for part in FFN_PARTS if self.target.holds(f"ffn.{part}"))

    def stored(self) -> dict[str, tuple[str, ...]]:
        """{key of a tensor of the FFN on disk: the parts that it holds one after the other}."""
        found: dict[str, tuple[str, ...]] = {}
        for part in self.parts:
            key = self.target.holds(f"ffn.{part}")
            assert key is not None
            found[key] = (*found.get(key, ()), part)
        return found

    def layout(self, layer: int) -> dict[str, tuple[Layout, tuple[str, ...]]]:
        """{key: ((name, dtype, shape) in the overlay, the parts that it holds)} of the FFN of a layer."""
        made = {}
        for key, parts in self.stored().items():
            shapes = [self._shape(part) for part in parts]
            shape = (sum(each[0] for each in shapes), *shapes[0][1:])
            made[key] = ((self.target.name(key, layer=layer), "F32", shape), parts)
        return made

    def _shape(self, part: str) -> tuple[int, ...]:
        tensors = self.target.tensors
        counts = {"width": lambda: self.width.after}
        return shape_of(f"ffn.{part}", self.draft.config.get, counts=counts, shapes=tensors.shapes, sizes=tensors.sizes)

    # -- items ---------------------------------------------------------------------------------------------------------

    @cached_property
    def _sources(self) -> Sources:
        return Sources(self.model)

    @cached_property
    def outside(self) -> OutsideFfn:
        return OutsideFfn(TargetTensors(self.draft, self._sources, Cut(self.width.after, 1, 0), self.dtype))

    def items(self) -> list[Item]:
        """The item of every tensor, in the order of the source's files."""
        made: list[Placed] = list(self.outside.carried())
        for layer in range(self.model.num_layers):
            made += self._collapsed(layer) if layer in self.layers else self._dense(layer)
        made += self.outside.added()
        made.sort(key=lambda pair: pair[0])
        return [item for _, item in made]

    def _collapsed(self, layer: int) -> Iterator[Placed]:
        """The FFN that takes the place of the experts, as it is measured into the overlay."""
        down = next(n for n, r in self.model.roles.items() if r.layer == layer and r.key == "expert.down")
        dtype = self.dtype or self.model.checkpoint.tensors[down].dtype
        for key, ((name, stored, shape), _) in self.layout(layer).items():
            read = Input(name, stored, shape, 0, tensor_nbytes(stored, shape), ORIGIN)
            spec = TensorSpec(name, dtype, shape, key, math.prod(shape))
            item = Item((spec,), "copy" if dtype == stored else "cast", (read,), {}, "ffn")
            yield self._sources.position_of(down), item

    def _dense(self, layer: int) -> Iterator[Placed]:
        """The FFN of a layer without experts, with neurons of zero up to the width of the others."""
        nodes = {part: self.draft.tensors.get(f"ffn.{part}") for part in self.parts}
        for key, parts in self.stored().items():
            each = [node for part in parts if (node := nodes[part]) is not None and self._sources.has(node, layer)]
            if not each:
                continue
            padded = [self._padded(node, part, layer) for node, part in zip(each, parts)]
            node = concat(*padded)
            (_, _, shape), _ = self.layout(layer)[key]
            yield self.outside.tensors.item(
                key, layer, node, shape=shape, changed="ffn" if self._sources.changes(node) else ""
            )

    def _padded(self, node: Node, part: str, layer: int) -> Node:
        shape = self._sources.shape(node, layer)
        axis = 1 if part == "down" else 0
        missing = self.width.after - shape[axis]
        if not missing:
            return node
        zeros = Node("fill", (), {**fill(0.0).params, "shape": [missing, shape[1 - axis]]})
        return transpose(concat(transpose(node), zeros)) if part == "down" else concat(node, zeros)

    def promise(self) -> dict[str, int]:
        """How many tensors of each role change."""
        padded, count = self.width.dense != self.width.after, len(self.stored()) * len(self.layers)
        for layer in (layer for layer in range(self.model.num_layers) if layer not in self.layers):
            for parts in self.stored().values():
                node = self.draft.tensors.get(f"ffn.{parts[0]}")
                if node is not None and self._sources.has(node, layer):
                    count += padded or len(parts) > 1 or self._sources.changes(node)
        return self.outside.promise({"ffn": count})


def choice_of_neurons(options: CollapseOptions, *, has_data: bool) -> str:
    """How the neurons are chosen. Raises UsageError for a way that needs data, without any."""
    how = options.neurons or ("surgeon" if has_data else "norm")
    if how in _ON_DATA and not has_data:
        raise UsageError(f"--neurons {how} runs the model on text, and there is no --data", hint="Pass --data FILE.")
    return how


def collapse_of(model: Model, options: CollapseOptions, common: PlanOptions) -> Collapse:
    """What the options make of a model. Raises InputError, with the reason, for a model without a dense twin, and
    UsageError for a width that it cannot have."""
    _check(model, common)
    dtype, width, reasons = parse_dtype(common.dtype), dense_width(model, options), list[InputError]()
    for pair in dense_twins(model.family, options.to):
        try:
            made = _drafted(model, pair, width, dtype)
            check_twin(model, pair, planned_model(_plan(made, common, {}, {})))
        except InputError as error:
            reasons.append(error)
            continue
        return made
    others = "; ".join(str(error) for error in reasons[1:3])
    raise InputError(str(reasons[0]), hint=f"Nor is another dense family exact: {others}." if others else
                     reasons[0].hint)  # fmt: skip


def collapse_plan(
    made: Collapse, options: CollapseOptions, common: PlanOptions, *, neurons: str, overlay: Overlay | None = None,
    figures: JsonObject | None = None,
) -> Plan:  # fmt: skip
    """The plan of a collapse. `overlay` has the measured FFNs; without it the plan has its sizes, and cannot be run.
    `neurons` says how the neurons are chosen."""
    parameters = parameters_of(options, common) | {"neurons": neurons}
    if overlay is not None:
        parameters |= {"overlay": fingerprint(overlay)}
    return _plan(made, common, parameters, {**_block(made, neurons), **(figures or {})})


def _check(model: Model, common: PlanOptions) -> None:
    family = model.family
    if model.quantization is not None:
        raise InputError(
            "collapse computes with the weights of the experts, and those of this model are quantized",
            hint="Collapse the unquantized checkpoint, and quantize the result.",
        )
    if common.shard_by == "expert":
        raise UsageError("--shard-by expert: the result has no experts", hint="Use --shard-by layer.")
    if family.kind == "moe" and model.weighs_inputs:
        raise InputError(
            f"{family.model_type} multiplies the inputs of its experts by the router's weights, so that one dense FFN "
            "cannot compute what they compute",
            hint=_SEE,
        )
    biased = [role.key for role in model.roles.values() if role.key.endswith("_bias") and role.group in _FFN]
    if biased:
        raise InputError(
            f"{family.model_type} has biases in its experts ({biased[0]}), which no FFN of a dense family takes",
            hint=_SEE,
        )


def _drafted(model: Model, pair: Pair, width: DenseWidth, dtype: str | None) -> Collapse:
    draft = draft_dense(model, pair)
    target = draft.target
    gated = model.family.holds("expert.gate") or any("gate" in p.parts for p in model.family.tensors.packed.values())
    if bool(gated) != bool(target.holds("ffn.gate")):
        raise InputError(
            f"only one of {model.family.model_type} and {target.model_type} has FFNs with a gate",
            hint="See `moeconv families` for other targets (--to).",
        )
    for key in ("intermediate_size", "shared_intermediate_size", "block_ff_dim"):
        if key in target.config.defaults:
            draft.config[key] = width.after
        if target.layers.ffn_width(lambda key: target.config.value(key, draft.config)) == width.after:
            break
    if dtype:
        draft.config.pop("torch_dtype", None)
        draft.config["dtype"] = TORCH_NAMES[dtype]
    return Collapse(model, pair, draft, width, dtype)


def _plan(made: Collapse, common: PlanOptions, parameters: JsonObject, block: JsonObject) -> Plan:
    model, draft, target = made.model, made.draft, made.target
    items = made.items()
    read = {ref.tensor for item in items for ref in item.inputs if ref.origin == "source"}
    left = [n for n, r in model.roles.items() if n not in read and r.group not in ("expert", "router", "shared")]
    total, active = count_planned(items, target, layers=model.num_layers, top_k=0, num_experts=0)
    return Plan(
        command="collapse",
        parameters=parameters,
        identity=model.identity,
        config=whole_config(model, target, draft.config, dtype=TORCH_NAMES[made.dtype] if made.dtype else None),
        shards=arrange(items, common, target),
        params_total=total,
        params_active=active,
        block=block,
        warnings=(*model.warnings, *draft.warnings, *other_values_elsewhere(target, draft.config)),
        dropped=(*model.dropped, *left),
        promise=made.promise(),
    )


def _block(made: Collapse, neurons: str) -> JsonObject:
    model, width = made.model, made.width
    return {
        "from": model.family.model_type,
        "to": made.target.model_type,
        "width": width.after,
        "experts_before": model.num_experts,
        "top_k_before": model.top_k,
        "expert_width": model.expert_width,
        "shared_width": width.shared,
        "collapsed_layers": list(made.layers),
        "neurons": neurons,
    }
