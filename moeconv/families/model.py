"""A checkpoint seen through its family: roles of tensors, sizes, and the names of every expert's matrices.

Opening a model proves that config and tensors agree, so that nothing later has to doubt either.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from moeconv.checkpoint.companions import without_code
from moeconv.checkpoint.header import FLOAT_DTYPES
from moeconv.checkpoint.reader import Checkpoint, TensorRef
from moeconv.errors import InputError, escape
from moeconv.families import packed
from moeconv.families.dense import DENSE
from moeconv.families.kinds import check_kinds
from moeconv.families.moe import MOE
from moeconv.families.moe_sources import MOE_SOURCES
from moeconv.families.pairs import HOMELESS
from moeconv.families.shapes import shared_width
from moeconv.families.sliding import Pattern
from moeconv.families.spec import FFN_PARTS, Family, Role
from moeconv.families.wrappers import UNTAKEN, WRAPPED

FAMILIES: dict[str, Family] = DENSE | MOE | MOE_SOURCES
_MAX_LAYERS = 4096
_MAX_EXPERTS = 65536
_MAX_IN_ALL = 1 << 20  # experts of all layers
_MAX_WIDTH = 1 << 24
_MAX_MTP = 16  # multi-token-prediction layers


@dataclass(frozen=True)
class Model:
    """A checkpoint, its family, and the role of each of its tensors."""

    checkpoint: Checkpoint
    family: Family
    roles: Mapping[str, Role]
    dropped: tuple[str, ...]

    @property
    def carried_config(self) -> dict[str, Any]:
        """config.json as a step carries it over: without the names of code that transformers' own class replaces."""
        return without_code(self.checkpoint.config)[0]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a step that reads the model says of it."""
        found = without_code(self.checkpoint.config)[1]
        own = f"auto_map of config.json is left out: transformers has {self.family.model_type} itself"
        return (*self.checkpoint.warnings, *([f"{own} ({'; '.join(found)})"] if found else []))

    @property
    def config(self) -> Mapping[str, Any]:
        """The part of config.json that describes the text model."""
        return _text_config(self.checkpoint.config, self.family)

    def value(self, key: str) -> Any:
        """A config key's value, with transformers' default when config.json leaves it out."""
        return self.family.default(key, self.config)

    @cached_property
    def num_layers(self) -> int:
        return _layer_count(self.family, self.config)

    @cached_property
    def num_experts(self) -> int:
        """Experts per MoE layer; 0 for a dense model."""
        return _count(self.config, self.family.num_experts, limit=_MAX_EXPERTS) if self.family.num_experts else 0

    @cached_property
    def top_k(self) -> int:
        """Experts per token; 0 for a dense model."""
        return _count(self.config, self.family.top_k, limit=_MAX_EXPERTS) if self.family.top_k else 0

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose FFN is a Mixture-of-Experts."""
        return _moe_layers(self.family, self.config, self.num_layers)

    @cached_property
    def mtp_layers(self) -> tuple[int, ...]:
        """Multi-token-prediction layers with experts: numbers behind those of the model's own layers, which no stock
        class of transformers runs and serving engines use to guess tokens ahead."""
        layers = {r.layer for r in self.roles.values() if r.group == "expert" and r.layer is not None}
        return tuple(sorted(layer for layer in layers if layer >= self.num_layers))

    @cached_property
    def layer_kinds(self) -> tuple[str, ...] | None:
        """The kind of each layer in a family that mixes kinds (attention, convolution, ...), else None."""
        return _layer_kinds(self.family, self.config, self.num_layers)

    def with_ffn(self, layers: Sequence[int], *, every: bool) -> tuple[int, ...]:
        """Those of `layers` that have an FFN. Raises InputError for one without, unless `every` layer is meant."""
        kinds, where = self.layer_kinds, self.family.where.get("ffn")
        without = [i for i in layers if kinds and where and kinds[i] not in where]
        if without and not every:
            raise InputError(
                f"layer {without[0]} has no FFN to make experts of", hint="`moeconv inspect` lists the layers."
            )
        return tuple(i for i in layers if i not in without)

    @cached_property
    def sliding(self) -> Pattern:
        """Which layers attend through a window."""
        return self.family.sliding.read({**self.family.config, **self.config}, self.num_layers)

    @cached_property
    def ffn_width(self) -> int:
        """Neurons of a dense FFN."""
        return _whole(self.family.ffn_width(self.value), "intermediate_size", limit=_MAX_WIDTH)

    @property
    def packed_experts(self) -> bool:
        """Whether one tensor on disk holds all experts of a layer."""
        return bool(self.family.packed)

    @cached_property
    def hidden_size(self) -> int:
        return _count(self.config, ("hidden_size",), limit=_MAX_WIDTH)

    @property
    def dtype(self) -> str:
        """The dtype (as safetensors names it) that most of the model's bytes have among floating dtypes."""
        count: dict[str, int] = {}
        for ref in self.checkpoint.tensors.values():
            if ref.dtype in ("BF16", "F16", "F32", "F64"):
                count[ref.dtype] = count.get(ref.dtype, 0) + ref.nbytes
        return max(count, key=lambda d: count[d]) if count else "BF16"

    @property
    def routed_share(self) -> float:
        """What the routed experts' weighted sum is multiplied by in the FFN's output: 1/2 where it is averaged with
        that of shared experts."""
        rule, width = self.family.averaged, self.family.shared_width
        return 0.5 if rule and self.value(rule[0]) == rule[1] and shared_width(width, self.value) else 1.0

    @property
    def renormalises(self) -> bool:
        """Whether the top-k expert weights are divided by their sum."""
        rule = self.family.routing.renormalise if self.family.routing else "never"
        return rule == "always" if rule in ("always", "never") else bool(self.value(rule))

    @cached_property
    def groups(self) -> tuple[int, int]:
        """(groups of experts, groups that a token may use); (1, 1) for a router that knows none."""
        rule = self.family.routing
        if rule is None or rule.groups is None:
            return 1, 1
        if rule.grouped_by and self.value(rule.grouped_by[0]) != rule.grouped_by[1]:
            return 1, 1
        count, used = (self.value(key) or 1 for key in rule.groups)
        if self.num_experts % count or not 0 < used <= count:
            raise InputError(
                f"config.json: {self.num_experts} experts cannot form {count} groups of which {used} are used",
                hint="Correct config.json, or download it again.",
            )
        return count, used

    @cached_property
    def own_head(self) -> bool:
        """Whether config ties the output embeddings to the input, and others are stored: transformers 5 then runs the
        stored ones, where older versions drop them. Equal bytes are simply tied. Reads both up to a difference."""
        names = {role.key: name for name, role in self.roles.items() if role.group == "embedding" and not role.part}
        head, tokens = names.get("embedding.lm_head"), names.get("embedding.tokens")
        tied = bool(self.value("tie_word_embeddings"))
        return tied and head is not None and tokens is not None and not self.checkpoint.same_bytes(head, tokens)

    @property
    def quantization(self) -> dict[str, Any] | None:
        return packed.quantization(self.checkpoint.config)

    def router_name(self, layer: int) -> str:
        return self.family.name("router.weight", layer=layer)

    def expert_name(self, part: str, *, layer: int, expert: int) -> str:
        """Name on disk of an expert's gate, up or down matrix. Raises InputError where experts are packed."""
        if self.packed_experts:
            raise InputError(
                f"{self.family.model_type} keeps all experts of a layer in one tensor; this command needs one tensor "
                "an expert, as the runtimes do that read packed weights",
                hint="`moeconv prune`, `calibrate` and `evaluate` take it as it is.",
            )
        if not self.family.has(f"expert.{part}"):
            raise InputError(f"the experts of {self.family.model_type} have no {part} matrix, which this command needs")
        return self.family.name(f"expert.{part}", layer=layer, expert=expert)

    def check_separate_experts(self) -> None:
        """Raises InputError where one tensor holds all experts of a layer."""
        if self.moe_layers and self.packed_experts:
            self.expert_name("down", layer=self.moe_layers[0], expert=0)

    def ffn_name(self, part: str, *, layer: int) -> str:
        return self.family.name(f"ffn.{part}", layer=layer)

    @cached_property
    def identity(self) -> str:
        """Portable fingerprint of the checkpoint, the bytes of its routers included."""
        return self.checkpoint.identity(name for name, role in self.roles.items() if role.group == "router")

    def numel(self, ref: TensorRef) -> int:
        """Parameters that a tensor stands for: elements of a plain tensor or of the codes of a packed weight."""
        part = self.roles[ref.name].part
        elements = math.prod(ref.shape)
        if part in ("", "weight") and ref.dtype not in ("U8", "I32"):
            return elements
        if part == "blocks":
            return 2 * elements
        if part in ("packed", "weight"):
            return ref.nbytes * 8 // (packed.bits_of(self.checkpoint.config) or 8)
        return 0


def _text_config(config: Mapping[str, Any], family: Family) -> Mapping[str, Any]:
    if not family.root:
        return family.read(config)
    text = config.get(family.root)
    if not isinstance(text, dict):
        raise InputError(
            f"config.json: {family.root} must be an object with the language model's settings, found "
            f"{escape(text)[:80]}",
            hint="Correct config.json, or download it again.",
        )
    # the classes tie by the outer key, and files older than transformers 5 have it inside
    tied = [part["tie_word_embeddings"] for part in (config, text) if part.get("tie_word_embeddings") is not None]
    said = {"tie_word_embeddings": next((x for x in tied if x), tied[0])} if tied else {}
    return {**family.read(text), **said}


def _count(config: Mapping[str, Any], aliases: tuple[str, ...], *, limit: int) -> int:
    found = {a: config[a] for a in aliases if config.get(a) is not None}
    values = set(map(repr, found.values()))
    if len(values) > 1:
        raise InputError(
            f"config.json contradicts itself: {', '.join(f'{k} = {escape(v)}' for k, v in found.items())}",
            hint="Correct config.json.",
        )
    return _whole(next(iter(found.values()), None), " or ".join(aliases), limit=limit)


def _layer_count(family: Family, config: Mapping[str, Any]) -> int:
    count = family.layer_count(lambda key: family.default(key, config))
    return _whole(count, "num_hidden_layers", limit=_MAX_LAYERS)


def _whole(value: Any, key: str, *, limit: int) -> int:
    if type(value) is not int or not 0 < value <= limit:
        raise InputError(
            f"config.json: {key} must be a whole number from 1 to {limit}, found {escape(value)}",
            hint="Correct config.json, or download it again.",
        )
    return value


def _moe_layers(family: Family, config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    if family.kind != "moe":
        return ()
    return family.placement.read(lambda key: family.default(key, config), layers)


def _layer_kinds(family: Family, config: Mapping[str, Any], layers: int) -> tuple[str, ...] | None:
    if family.layer_kinds is None:
        return None
    kinds = family.layer_kinds(lambda key: family.default(key, config), layers)
    if not isinstance(kinds, list) or len(kinds) != layers or not all(isinstance(k, str) for k in kinds):
        raise InputError(f"config.json: layer_types must be a list of {layers} words", hint="Correct config.json.")
    return tuple(kinds)


def find_family(config: Mapping[str, Any]) -> Family:
    """The row for a config.json, by model_type. Raises InputError for an unknown architecture."""
    model_type = config.get("model_type")
    known = f"Known families: {', '.join(sorted({*FAMILIES, *WRAPPED}))} (`moeconv families`)."
    inside = {key: value["model_type"] for key, value in config.items() if isinstance(value, dict)
              and isinstance(value.get("model_type"), str)}  # fmt: skip
    if not isinstance(model_type, str):
        raise InputError(f"unknown architecture: model_type {escape(model_type)!r}", hint=known)
    if model_type in WRAPPED:
        return _find_wrapped(model_type, config)
    if model_type in UNTAKEN:
        raise InputError(f"{model_type} cannot be taken: {UNTAKEN[model_type]}", hint=known)
    if model_type in FAMILIES:
        plain = DENSE.get(model_type)
        return plain if plain is not None and _is_plain(plain, config) else FAMILIES[model_type]
    if model_type in HOMELESS:
        raise InputError(
            f"{model_type} cannot become a Mixture-of-Experts of any stock family: {HOMELESS[model_type]}", hint=known
        )
    for key, text in inside.items():
        if text in FAMILIES or text in HOMELESS:
            kind = "dense" if text in DENSE or text in HOMELESS else "Mixture-of-Experts"
            raise InputError(
                f"{escape(model_type)} is a multimodal model around {text} ({kind}, config.json: {key}), and no row "
                "says how its tensors lie and what of them is the language model",
                hint=f"Multimodal families: {', '.join(sorted(WRAPPED))}. Of others give the language model alone.",
            )
    raise InputError(f"unknown architecture: model_type {escape(model_type)!r}", hint=known)


def _find_wrapped(model_type: str, config: Mapping[str, Any]) -> Family:
    """The row of a multimodal model, by the language model in it."""
    rows = WRAPPED[model_type]
    root = next(iter(rows.values())).root
    nested = config.get(root)
    text = nested.get("model_type") if isinstance(nested, dict) else None
    if text is None and len(rows) == 1:
        return next(iter(rows.values()))
    if not isinstance(text, str) or text not in rows:
        raise InputError(
            f"{model_type} around {escape(text)!r} (config.json: {root}.model_type) is not known",
            hint=f"Known in {model_type}: {', '.join(sorted(rows))}.",
        )
    return rows[text]


def _is_plain(plain: Family, config: Mapping[str, Any]) -> bool:
    """Whether config is that of the dense row of a family that has an MoE row too."""
    family = FAMILIES[plain.model_type]
    said = family.read(config)
    return plain.no_experts is not None and plain.no_experts(lambda key: family.default(key, said))


def open_model(path: str | os.PathLike[str] | Checkpoint) -> Model:
    """Open a checkpoint directory and check that its tensors are those of its family and config.

    Raises InputError for an unknown architecture, a missing or unexpected tensor, or a shape that contradicts config.
    """
    checkpoint = Checkpoint(path) if isinstance(path, str | os.PathLike) else path
    family = find_family(checkpoint.config)
    check_kinds(family, _text_config(checkpoint.config, family))
    _check_only(family, _text_config(checkpoint.config, family))
    family = _with_rule(family, _text_config(checkpoint.config, family))
    family = _with_layout(family, checkpoint)
    roles, dropped = _assign_roles(checkpoint, family)
    model = Model(checkpoint, family, roles, dropped)
    _check_complete(model)
    _check_mtp(model)
    if not model.quantization:
        _check_shapes(model)
    return model


def _check_only(family: Family, config: Mapping[str, Any]) -> None:
    for key, (values, meaning) in family.only.items():
        value = family.default(key, config)
        if value not in values:
            raise InputError(
                f"{family.model_type} with {key} = {escape(value)}: {meaning}",
                hint=f"Known with {key} = {' or '.join(map(str, values))} alone.",
            )


def _with_rule(family: Family, config: Mapping[str, Any]) -> Family:
    """The row with the routing rule that config.json picks."""
    if family.rules is None:
        return family
    key, rules = family.rules
    return replace(family, routing=rules.get(str(family.default(key, config)), family.routing))


def _with_layout(family: Family, checkpoint: Checkpoint) -> Family:
    """The row with the layout that the experts have on disk, found by the names and shapes of one layer's."""
    if not family.layouts:
        return family
    quantized = packed.quantization(checkpoint.config) is not None
    for form in family.forms():
        model = Model(checkpoint, form, {}, ())
        layer = next(iter(model.moe_layers), None)
        wide = {"expert": _whole(model.value(family.expert_width), family.expert_width, limit=_MAX_WIDTH)}
        for key in (key for key in form.tensors if key.startswith("expert.")):
            ref = checkpoint.tensors.get(form.name(key, layer=layer, expert=0))
            if ref is None or not (quantized or ref.shape == _expected_shape(model, Role(key, layer), wide)):
                break
        else:
            return form
    return family


def _assign_roles(checkpoint: Checkpoint, family: Family) -> tuple[dict[str, Role], tuple[str, ...]]:
    config = _text_config(checkpoint.config, family)
    layers = _layer_count(family, config)
    if (
        family.kind == "moe"
        and not _moe_layers(family, config, layers)
        and not any(map(config.get, family.num_experts))
    ):
        raise InputError(
            f"config.json makes no layer of this {family.model_type} a Mixture-of-Experts",
            hint="Of this family only models with experts are known here.",
        )
    experts = _count(config, family.num_experts, limit=_MAX_EXPERTS) if family.num_experts else 0
    # before every name is spelled out: a config of a few bytes must not cost gigabytes
    each = experts if any("{E}" in template for template in family.tensors.values()) else 1
    least = max(layers, len(_moe_layers(family, config, layers)) * each)
    if least > len(checkpoint.tensors) or layers * experts > _MAX_IN_ALL:
        raise InputError(
            f"config.json asks for {layers} layers" + (f" of {experts} experts" if experts else "")
            + f", which {len(checkpoint.tensors)} tensors cannot be",
            hint="config.json and the shards do not belong together, or a shard is missing.",
        )  # fmt: skip
    known = dict(family.expand(layers=layers, experts=experts))
    for form in family.forms() if family.layouts else (family,):
        known |= form.expand_mtp(first=layers, count=_mtp_count(checkpoint, family, config), experts=experts)
    useless = {t.replace("{L}", str(layer)) for t in family.dropped for layer in range(layers)}
    quantized = packed.quantization(checkpoint.config) is not None
    roles: dict[str, Role] = {}
    dropped: list[str] = []
    for name in checkpoint.tensors:
        role = known.get(name)
        if quantized and (split := packed.split_part(name)) is not None and (whole := known.get(split[0])):
            is_plain = role is not None and checkpoint.tensors[name].dtype in FLOAT_DTYPES
            role = role if is_plain else Role(whole.key, whole.layer, whole.expert, split[1])
        elif quantized and role is not None and checkpoint.tensors[name].dtype in packed.CODES:
            role = replace(role, part="weight")
        beside = next((group for start, group in family.beside.items() if name.startswith(start)), None)
        if role is not None:
            roles[name] = role
        elif beside is not None:
            roles[name] = Role(f"{beside}.{name}")
        elif name in useless:
            dropped.append(name)
        else:
            raise InputError(
                f"tensor {escape(name)!r} is not part of a {family.model_type} model of this config",
                hint="The checkpoint is of another architecture or version than its config.json says.",
            )
    return roles, tuple(dropped)


def _mtp_count(checkpoint: Checkpoint, family: Family, config: Mapping[str, Any]) -> int:
    """Multi-token-prediction layers that the checkpoint may hold."""
    if not family.mtp:
        return 0
    if family.mtp_prefix:
        return sum(
            f"{family.mtp_prefix}layers.{i}.input_layernorm.weight" in checkpoint.tensors for i in range(_MAX_MTP)
        )
    count = family.default("num_nextn_predict_layers", config) or 0
    return min(count, _MAX_MTP)


def _check_mtp(model: Model) -> None:
    """Every expert of a multi-token-prediction layer has the same tensors, and the layer a router."""
    for layer in model.mtp_layers:
        parts: dict[int | None, int] = {}
        for role in model.roles.values():
            if role.layer == layer and role.group == "expert":
                parts[role.expert] = parts.get(role.expert, 0) + 1
        whole = set(parts) in ({None}, set(range(model.num_experts)))
        if not whole or len(set(parts.values())) != 1 or ("router.weight", layer) not in {
            (r.key, r.layer) for r in model.roles.values()
        }:  # fmt: skip
            raise InputError(
                f"the multi-token-prediction layer {layer} lacks an expert or its router", hint="A shard is missing."
            )


def _check_complete(model: Model) -> None:
    """Every tensor that the family and config ask for is there, in each layer that needs it."""
    family, moe = model.family, set(model.moe_layers)
    for start, group in family.beside.items():
        has = isinstance(model.checkpoint.config.get(f"{group}_config"), dict)
        if has and not any(name.startswith(start) for name in model.roles):
            raise InputError(f"no tensor of the checkpoint begins with {start}", hint="A shard is missing.")
    there = {(r.key, r.layer, r.expert) for r in model.roles.values()}
    for name, role in family.expand(layers=model.num_layers, experts=model.num_experts):
        in_moe = role.layer in moe
        belongs = {"expert": in_moe, "router": in_moe, "shared": in_moe, "ffn": not in_moe}.get(role.group, True)
        if role.group in family.where and model.layer_kinds and role.layer is not None:
            belongs = model.layer_kinds[role.layer] in family.where[role.group]
        wanted = belongs and role.key not in family.optional
        present = (role.key, role.layer, role.expert) in there
        if wanted and not present:
            raise InputError(
                f"tensor {escape(name)!r} is missing from the checkpoint",
                hint="config.json and the shards do not belong together, or a shard is missing.",
            )
        if present and not belongs:
            kind = "Mixture-of-Experts" if in_moe else "dense"
            if role.group in family.where and model.layer_kinds and role.layer is not None:
                kind = model.layer_kinds[role.layer]
            raise InputError(
                f"tensor {escape(name)!r} is there although config.json makes layer {role.layer} {kind}",
                hint="config.json and the shards do not belong together.",
            )
    tied = bool(model.value("tie_word_embeddings"))
    if not tied and ("embedding.lm_head", None, None) not in there:
        raise InputError("lm_head.weight is missing and the embeddings are not tied", hint="A shard is missing.")


def _check_shapes(model: Model) -> None:
    """Experts, routers and FFNs have the sizes that config.json states."""
    tensors, family = model.checkpoint.tensors, model.family
    groups = {role.group for role in model.roles.values()}
    wide: dict[str, int] = {}
    if "ffn" in groups:
        wide["ffn"] = model.ffn_width
    if "expert" in groups:
        wide["expert"] = _whole(model.value(family.expert_width), family.expert_width, limit=_MAX_WIDTH)
    if "shared" in groups and family.shared_width:
        parts = [_whole(model.value(key), key, limit=_MAX_WIDTH) for key in family.shared_width]
        wide["shared"] = math.prod(parts)
    for name, role in model.roles.items():
        want = _expected_shape(model, role, wide)
        if want is not None and tensors[name].shape != want:
            raise InputError(
                f"tensor {escape(name)!r} has shape {list(tensors[name].shape)}, config.json says {list(want)}",
                hint="config.json and the shards do not belong together.",
            )


def _expected_shape(model: Model, role: Role, wide: Mapping[str, int]) -> tuple[int, ...] | None:
    """The shape of an FFN's or expert's matrix, or of a router; None for a tensor that no rule here is about."""
    group, _, part = role.key.partition(".")
    hidden = model.hidden_size
    if role.key == "router.weight":
        return (model.num_experts, hidden)
    if group not in wide:
        return None
    width = wide[group]
    layout = model.family.packed.get(role.key) if role.expert is None else None
    if layout is not None:
        outside = hidden if "down" in layout.parts[0] else width * len(layout.parts)
        if layout.parts[0].endswith("_bias"):
            return (model.num_experts, outside)
        inside = width if "down" in layout.parts[0] else hidden
        first, second = (inside, outside) if layout.transposed else (outside, inside)
        return (model.num_experts * first, second) if layout.flat else (model.num_experts, first, second)
    if role.key in model.family.fused:
        return (width * len(model.family.fused[role.key]), hidden)
    if part in FFN_PARTS:
        return (hidden, width) if part == "down" else (width, hidden)
    return None
