"""A checkpoint together with its family: the roles of its tensors, its sizes, and the names of each expert's matrices.

`open_model` checks that config and tensors agree, so that no later code has to check it again.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from moeconv.checkpoint.companions import without_code
from moeconv.checkpoint.reader import Checkpoint
from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.errors import InputError, escape
from moeconv.families import check, packed, settings
from moeconv.families.find import find_family, without_aliases
from moeconv.families.kinds import check_kinds
from moeconv.families.mlx_lm import switch_form
from moeconv.families.names import as_loaded, heads, is_cache_scale
from moeconv.families.roles import assign_roles
from moeconv.families.settings import MAX_EXPERTS, MAX_WIDTH, text_config
from moeconv.families.shapes import shared_width
from moeconv.families.sliding import Pattern
from moeconv.families.spec import Family, Role
from moeconv.types import Config, JsonObject
from moeconv.units import counted


@dataclass(frozen=True)
class Model:
    """A checkpoint, its family, and the role of each of its tensors."""

    checkpoint: Checkpoint
    family: Family
    roles: Mapping[str, Role]
    dropped: tuple[str, ...]

    @property
    def carried_config(self) -> JsonObject:
        """The source's config.json as a command copies it to its output.

        References to remote code that a class of transformers replaces are removed. If the head of another class (a
        classifier, for example) is left out, `architectures` names the language model's class.
        """
        config = dict(self.checkpoint.config)
        if self.family.remote is None:
            config = without_code(config)[0]
        return config | ({"architectures": [self.family.architecture]} if heads(self.dropped) else {})

    @property
    def warnings(self) -> tuple[str, ...]:
        """The warnings that every command gives that reads the model."""
        found = without_code(self.checkpoint.config)[1] if self.family.remote is None else []
        has = f"transformers has {self.family.model_type} itself"
        own = f"auto_map of config.json is left out: {'the result has a stock class' if self.family.runs_as else has}"
        lost = heads(self.dropped)
        cache = [name for name in self.dropped if is_cache_scale(name)]
        other = "left out as transformers' language model leaves it out, the head of another class"
        return (
            *self.checkpoint.warnings,
            *([f"{own} ({'; '.join(found)})"] if found else []),
            *([f"{other}: {', '.join(map(escape, lost[:4]))}"] if lost else []),
            *([f"{counted(len(cache), 'scale')} of the key-value cache are left out"] if cache else []),
        )

    @cached_property
    def config(self) -> Config:
        """The part of config.json that describes the text model."""
        return text_config(self.checkpoint.config, self.family)

    def value(self, key: str) -> Any:
        """A config key's value, or transformers' default if config.json leaves the key out."""
        return self.family.config.value(key, self.config)

    @cached_property
    def num_layers(self) -> int:
        return settings.layer_count(self.family, self.config)

    @cached_property
    def num_experts(self) -> int:
        """Experts per MoE layer; 0 for a dense model."""
        return (
            settings.count(self.config, self.family.experts.count, limit=MAX_EXPERTS)
            if self.family.experts.count
            else 0
        )

    @cached_property
    def top_k(self) -> int:
        """Experts per token; 0 for a dense model."""
        return (
            settings.count(self.config, self.family.experts.top_k, limit=MAX_EXPERTS)
            if self.family.experts.top_k
            else 0
        )

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose FFN is a Mixture-of-Experts."""
        return settings.moe_layers(self.family, self.config, self.num_layers)

    @cached_property
    def mtp_layers(self) -> tuple[int, ...]:
        """Numbers of the multi-token-prediction layers that have experts, counted on from the model's own layers.

        No stock class of transformers runs such layers; serving engines use them for speculative decoding.
        """
        layers = {r.layer for r in self.roles.values() if r.group == "expert" and r.layer is not None}
        return tuple(sorted(layer for layer in layers if layer >= self.num_layers))

    @cached_property
    def prediction_layers(self) -> tuple[int, ...]:
        """Numbers of all multi-token-prediction layers, dense ones too, counted on from the model's own layers."""
        layers = {r.layer for r in self.roles.values() if r.layer is not None and r.layer >= self.num_layers}
        return tuple(sorted(layers))

    def place_of_prediction(self, number: int) -> int | None:
        """The last of the model's own layers that has the same tensors, and the same attention, as the decoder layer in
        multi-token-prediction layer `number`. None if there is no such layer, or a prediction step is not one layer."""
        if self.family.prediction.otherwise:
            return None
        slides = self.sliding.layers
        blocks: dict[int | None, set[str]] = {}
        for role in self.roles.values():
            if role.key not in self.family.prediction.names:
                blocks.setdefault(role.layer, set()).add("expert" if role.group == "expert" else role.key)
        same = (
            layer
            for layer in reversed(range(self.num_layers))
            if blocks.get(layer) == blocks[number]
            and (bool(slides[layer]) if layer < len(slides) else False) == self.family.prediction.slides
        )
        return next(same, None)

    @cached_property
    def layer_kinds(self) -> tuple[str, ...] | None:
        """The kind of each layer in a family that mixes kinds (attention, convolution, ...); None in other families."""
        return settings.layer_kinds(self.family, self.config, self.num_layers)

    def with_ffn(self, layers: Sequence[int], *, every: bool) -> tuple[int, ...]:
        """Those of `layers` that have an FFN.

        Raises InputError if one has none, unless `every` is set because the user asked for all layers.
        """
        kinds, where = self.layer_kinds, self.family.layers.where.get("ffn")
        without = [i for i in layers if kinds and where and kinds[i] not in where]
        if without and not every:
            raise InputError(
                f"layer {without[0]} has no FFN to make experts of", hint="`moeconv inspect` lists the layers."
            )
        return tuple(i for i in layers if i not in without)

    @cached_property
    def sliding(self) -> Pattern:
        """Which layers attend through a window."""
        return self.family.attention.sliding.read({**self.family.config.defaults, **self.config}, self.num_layers)

    @cached_property
    def ffn_width(self) -> int:
        """Neurons of a dense FFN."""
        return settings.whole(self.family.layers.ffn_width(self.value), "intermediate_size", limit=MAX_WIDTH)

    @cached_property
    def expert_width(self) -> int:
        """Neurons of a routed expert."""
        return check.width_of(self, self.family.experts.width)

    @property
    def cut_width(self) -> int:
        """Neurons of what `prune --width` cuts: of a routed expert, or of the FFN of a dense model."""
        return self.expert_width if self.family.kind == "moe" else self.ffn_width

    @cached_property
    def shared_width(self) -> int:
        """Neurons of the shared expert. Raises KeyError for a family without one."""
        if not self.family.experts.shared_width:
            raise KeyError("shared_width")
        return check.width_of(self, *self.family.experts.shared_width)

    @property
    def packed_experts(self) -> bool:
        """Whether one tensor on disk holds all experts of a layer."""
        return bool(self.family.tensors.packed)

    @cached_property
    def hidden_size(self) -> int:
        return settings.count(self.config, ("hidden_size",), limit=MAX_WIDTH)

    @cached_property
    def expert_dimension(self) -> int:
        """The width of what an expert reads and writes: the hidden size, or that of the latent space of its layer."""
        return check.Shapes(self)(Role("expert.down", expert=0))[0]  # type: ignore[index]

    @property
    def residual_size(self) -> int:
        """Width of the hidden states between layers: several residual streams, in a family that has them."""
        key = self.family.layers.streams
        return self.hidden_size * (settings.whole(self.value(key), key, limit=MAX_WIDTH) if key else 1)

    @property
    def dtype(self) -> str:
        """The floating-point dtype, as safetensors names it, of most of the model's bytes; "BF16" if there is none."""
        count: dict[str, int] = {}
        for ref in self.checkpoint.tensors.values():
            if ref.dtype in ("BF16", "F16", "F32", "F64"):
                count[ref.dtype] = count.get(ref.dtype, 0) + ref.nbytes
        return max(count, key=lambda d: count[d]) if count else "BF16"

    @property
    def routed_share(self) -> float:
        """The factor of the routed experts' weighted sum in the FFN's output.

        It is 1/2 where the sum is averaged with the output of shared experts, and a setting in some families; else 1.
        """
        if self.family.experts.factor:
            return float(self.value(self.family.experts.factor))
        rule, width = self.family.experts.averaged, self.family.experts.shared_width
        return 0.5 if rule and self.value(rule[0]) == rule[1] and shared_width(width, self.value) else 1.0

    @property
    def renormalises(self) -> bool:
        """Whether the top-k expert weights are divided by their sum."""
        rule = self.family.experts.routing.renormalise if self.family.experts.routing else "never"
        return rule == "always" if rule in ("always", "never") else bool(self.value(rule))

    @property
    def weighs_inputs(self) -> bool:
        """Whether the routing weights multiply the experts' inputs instead of their outputs."""
        return self.family.experts.routing is not None and self.family.experts.routing.on_input

    @cached_property
    def groups(self) -> tuple[int, int]:
        """(number of groups of experts, number of groups that a token may use); (1, 1) for a router without groups.

        Raises InputError if the experts cannot form such groups.
        """
        rule = self.family.experts.routing
        if rule is None or rule.groups is None:
            return 1, 1
        if rule.grouped_by and self.value(rule.grouped_by[0]) != rule.grouped_by[1]:
            return 1, 1
        count, used = (self.value(key) or 1 for key in rule.groups)
        if self.num_experts % count or not 0 < used <= count:
            raise InputError(
                f"config.json: {counted(self.num_experts, 'expert')} cannot form {count} groups of which {used} "
                "are used",
                hint="Correct config.json, or download it again.",
            )
        return count, used

    @cached_property
    def own_head(self) -> bool:
        """Whether config.json ties the output head to the token embedding although a different head is stored.

        transformers 5 then computes with the stored head, older versions ignore it. A stored head with the bytes of the
        embedding counts as tied. Reads both tensors up to their first difference.
        """
        names = {role.key: name for name, role in self.roles.items() if role.group == "embedding" and not role.part}
        head, tokens = names.get("embedding.lm_head"), names.get("embedding.tokens")
        tied = bool(self.value("tie_word_embeddings"))
        return tied and head is not None and tokens is not None and not self.checkpoint.same_bytes(head, tokens)

    @property
    def quantization(self) -> JsonObject | None:
        return packed.quantization(self.checkpoint.config)

    @cached_property
    def stored(self) -> Mapping[str, packed.Stored]:
        """Every packed weight, by the name that it has unpacked.

        Raises InputError if a weight's parts do not match quantization_config and the weight's shape, and Unsupported
        for a packing that moeconv cannot read.
        """
        return check.stored_weights(self)

    def router_name(self, layer: int) -> str:
        return self.family.name("router.weight", layer=layer)

    def expert_name(self, part: str, *, layer: int, expert: int) -> str:
        """Name on disk of an expert's gate, up or down matrix.

        Raises InputError if one tensor holds all experts of a layer, or the experts have no such matrix.
        """
        if self.packed_experts:
            raise InputError(
                f"{self.family.model_type} keeps all experts of a layer in one tensor; this command needs one tensor "
                "per expert, as the runtimes do that read packed weights",
                hint="`moeconv prune`, `calibrate` and `evaluate` take it as it is.",
            )
        if not self.family.has(f"expert.{part}"):
            raise InputError(f"the experts of {self.family.model_type} have no {part} matrix, which this command needs")
        return self.family.name(f"expert.{part}", layer=layer, expert=expert)

    def check_separate_experts(self) -> None:
        """Raises InputError if one tensor holds all experts of a layer."""
        if self.moe_layers and self.packed_experts:
            self.expert_name("down", layer=self.moe_layers[0], expert=0)

    def ffn_name(self, part: str, *, layer: int) -> str:
        return self.family.name(f"ffn.{part}", layer=layer)

    @cached_property
    def identity(self) -> str:
        """A fingerprint of the checkpoint that is the same on every machine; it covers the bytes of the routers."""
        return self.checkpoint.identity(name for name, role in self.roles.items() if role.group == "router")

    def numel(self, ref: TensorRef) -> int:
        """The number of parameters in a tensor.

        For a plain tensor it is the number of elements. For a packed weight the tensor with the codes has them all, and
        the other parts (scales, ...) have 0.
        """
        role = self.roles[ref.name]
        if not role.part:
            return math.prod(ref.shape)
        return math.prod(self.stored[packed.weight_of(ref.name)].shape) if role.part in packed.CODES else 0


def open_model(path: str | os.PathLike[str] | Checkpoint, *, follow_links: bool = False) -> Model:
    """Open a checkpoint directory, and check that its tensors are those of its family and config.

    With `follow_links`, its files may be links to files outside the directory. Raises InputError for an unknown
    architecture, a missing or unexpected tensor, or a shape that contradicts config.json.
    """
    checkpoint = Checkpoint(path, follow_links=follow_links) if isinstance(path, str | os.PathLike) else path
    checkpoint = _without_aliases(checkpoint)
    family = find_family(checkpoint.config)
    check.check_foreign(checkpoint)
    checkpoint = as_loaded(checkpoint, family)
    config = text_config(checkpoint.config, family)
    check_kinds(family, config)
    check.check_only(family, config)
    family = _with_layout(_with_rule(family, config), checkpoint)
    roles, dropped = assign_roles(checkpoint, family)
    model = Model(checkpoint, family, roles, dropped)
    check.check_complete(model)
    check.check_mtp(model)
    check.check_plain(model)
    check.check_stored(model)
    return model


def _without_aliases(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the model_types that transformers has classes for."""
    config, replaced = without_aliases(checkpoint.config)
    if not replaced:
        return checkpoint
    named = " and ".join(f"{old} is {new}" for old, new in replaced.items())
    return checkpoint.reworded(config, f"{named} in transformers, whose class computes the same: outputs state that")


def _with_rule(family: Family, config: Config) -> Family:
    """The row with the routing rule that config.json selects."""
    if family.experts.rules is None:
        return family
    key, rules = family.experts.rules
    routing = rules.get(str(family.config.value(key, config)), family.experts.routing)
    return replace(family, experts=replace(family.experts, routing=routing))


def _with_layout(family: Family, checkpoint: Checkpoint) -> Family:
    """The row with the layout that the experts have on disk: most names and shapes in one layer belong to it."""
    quantized = packed.quantization(checkpoint.config) is not None
    for form in (family.served_form, switch_form(family)):
        if form is not None and _has_experts(checkpoint, form):
            return form
    if not family.tensors.layouts:
        return family

    def belong(form: Family) -> int:
        model = Model(checkpoint, form, {}, ())
        layer, expected = next(iter(model.moe_layers), None), check.Shapes(model)
        found = 0
        for key in (key for key in form.tensors.names if key.startswith("expert.")):
            apart = 0 if "{E}" in form.tensors.names[key] else None
            ref = checkpoint.tensors.get(form.name(key, layer=layer, expert=0))
            found += ref is not None and (quantized or ref.shape == expected(Role(key, layer, apart)))
        return found

    return max(family.forms(), key=belong)


def _has_experts(checkpoint: Checkpoint, family: Family) -> bool:
    """Whether the checkpoint has the down projection of a single expert, packed or not, under the name in this row."""
    layer = next(iter(Model(checkpoint, family, {}, ()).moe_layers), None)
    name = family.name("expert.down", layer=layer, expert=0)
    apart = (packed.name_of(name, part, stacked=False) for part in packed.CODES_APART)
    return name in checkpoint.tensors or any(stored in checkpoint.tensors for stored in apart)
