"""The checks when a model is opened: every tensor that family and config require exists, and has the right shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from moeconv.checkpoint.header import FLOAT_DTYPES
from moeconv.checkpoint.reader import Checkpoint
from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.errors import InputError, Unsupported, escape
from moeconv.families.foreign import GIVE, bits_of, recognise
from moeconv.families.methods import METHODS, encodings, forms_of, quantization_method
from moeconv.families.names import module_names, why_no_head
from moeconv.families.packed import Stored, fit, weight_of
from moeconv.families.packed import quantization as checkpoint_quantization
from moeconv.families.records import Packed
from moeconv.families.settings import MAX_WIDTH, whole
from moeconv.families.shapes import Place, shape_of
from moeconv.families.spec import UNCHANGED, Family, Role
from moeconv.types import Config

if TYPE_CHECKING:
    from moeconv.families.model import Model

# group of keys -> whether only layers with experts have it, or only dense ones
_SPARSE = {"expert": True, "router": True, "shared": True, "ffn": False}
_TOGETHER = "config.json and the shards do not belong together"


def check_foreign(checkpoint: Checkpoint) -> None:
    """Raises Unsupported for a quantization that moeconv does not read, and for a quantization_config in a nested part
    of config.json; InputError for invalid settings."""
    quantization = checkpoint_quantization(checkpoint.config)
    nested = [
        key for key, part in checkpoint.config.items() if isinstance(part, dict) and "quantization_config" in part
    ]
    if nested and quantization is None:
        raise Unsupported(
            f"quantization_config is inside {escape(nested[0])} of config.json, where moeconv does not read it",
            hint="Move it to the top level, where transformers looks first.",
        )
    stated = checkpoint.config if quantization is None else {**checkpoint.config, "quantization_config": quantization}
    # settings that state no method, and that a method that is read has
    unnamed = quantization if quantization is not None and quantization.get("quant_method") is None else {}
    found = None if quantization_method(unnamed) in METHODS else recognise(stated, checkpoint.tensors)
    if found is not None:
        way, settings = found
        bits, group = bits_of(way, settings), settings.get("group_size")
        numbers = [f"{bits} bits"] * (bits is not None) + [f"groups of {group}"] * (type(group) is int and group > 0)
        raise Unsupported(
            f"the weights are quantized by {way.name}" + (f" ({', '.join(numbers)})" if numbers else "")
            + f", {way.why}",
            hint=way.hint,
        )  # fmt: skip
    if quantization is not None:
        encodings(
            quantization
        )  # before the names of tensors are checked: those of an unknown form would look like errors


def check_only(family: Family, config: Config) -> None:
    """Raises Unsupported for a value of a config key with which the family is not supported."""
    for key, (values, meaning) in family.config.only.items():
        value = family.config.value(key, config)
        if value not in values:
            raise Unsupported(
                f"{family.model_type} with {key} = {escape(value)}: {meaning}",
                hint=f"It is supported only with {key} = {' or '.join(map(str, values))}.",
            )


def check_complete(model: Model) -> None:
    """Raises InputError if a tensor is missing that family and config require, or if a layer has one of another kind of
    layer."""
    family, moe = model.family, frozenset(model.moe_layers)
    _check_beside(model)
    there: dict[tuple[str, int | None], set[int | None]] = {}
    for role in model.roles.values():
        there.setdefault((role.key, role.layer), set()).add(role.expert)
    on = (keys for switch, keys in family.tensors.switched.items() if model.value(switch))
    optional = family.tensors.optional.difference(*on)
    for key, layer, experts in family.places(layers=model.num_layers, experts=model.num_experts):
        role, expected, present = Role(key, layer), set(experts), there.get((key, layer), set())
        if not _belongs(model, role, moe):
            if found := expected & present:
                raise InputError(
                    f"tensor {escape(_first(family, role, found))!r} exists, although config.json makes layer {layer} "
                    f"{_kind_of_layer(model, role)}",
                    hint=f"{_TOGETHER}.",
                )
        elif key not in optional and not expected <= present:
            raise InputError(
                f"tensor {escape(_first(family, role, expected - present))!r} is missing from the checkpoint",
                hint=f"{_TOGETHER}, or a shard is missing.",
            )
    tied = bool(model.value("tie_word_embeddings"))
    if not tied and ("embedding.lm_head", None) not in there:
        raise InputError("lm_head.weight is missing, and the embeddings are not tied", hint=why_no_head(model.dropped))


def _first(family: Family, role: Role, experts: Iterable[int | None]) -> str:
    """The name of the tensor of a role, for the first of `experts`."""
    return family.name(role.key, layer=role.layer, expert=min(experts, key=lambda expert: expert or 0))


def _check_beside(model: Model) -> None:
    """Raises InputError if a multimodal model has no tensors of a part that its config describes."""
    for start, group in model.family.multimodal.beside.items():
        described = isinstance(model.checkpoint.config.get(f"{group}_config"), dict)
        if (
            described
            and start not in model.family.multimodal.may_lack
            and not any(name.startswith(start) for name in model.roles)
        ):
            raise InputError(f"no tensor of the checkpoint begins with {start}", hint="A shard is missing.")


def _mixed_kind(model: Model, role: Role) -> str | None:
    """The kind of the tensor's layer, in a family where only layers of some kinds have the tensor."""
    if model.layer_kinds is None or role.layer is None or _where(model, role) is None:
        return None
    return model.layer_kinds[role.layer]


def _where(model: Model, role: Role) -> frozenset[str] | None:
    """The kinds of layers that have the tensor; None if it does not depend on the kind."""
    where = model.family.layers.where
    return where.get(role.key, where.get(role.group))


def _belongs(model: Model, role: Role, moe: frozenset[int]) -> bool:
    """Whether the tensor's layer should have this tensor."""
    listed = model.family.layers.listed.get(role.group)
    if listed is not None:
        return role.layer in listed(model.value)
    kind, where = _mixed_kind(model, role), _where(model, role)
    if kind is not None and where is not None:
        return kind in where
    sparse = model.family.experts.only.get(role.key, _SPARSE.get(role.group))
    return sparse is None or sparse == (role.layer in moe)


def _kind_of_layer(model: Model, role: Role) -> str:
    """The kind of the tensor's layer according to config.json, in words for an error."""
    if role.group in model.family.layers.listed:
        return f"one without {role.key}"
    usual = "Mixture-of-Experts" if role.layer in model.moe_layers else "dense"
    return _mixed_kind(model, role) or usual


def check_mtp(model: Model) -> None:
    """Raises InputError unless all experts of each multi-token-prediction layer have the same tensors, and the layer
    has a router."""
    for layer in model.mtp_layers:
        parts: dict[int | None, int] = {}
        for role in model.roles.values():
            if role.layer == layer and role.group == "expert":
                parts[role.expert] = parts.get(role.expert, 0) + 1
        complete = set(parts) in ({None}, set(range(model.num_experts)))
        if not complete or len(set(parts.values())) != 1 or ("router.weight", layer) not in {
            (r.key, r.layer) for r in model.roles.values()
        }:  # fmt: skip
            raise InputError(
                f"the multi-token-prediction layer {layer} lacks an expert or its router", hint="A shard is missing."
            )


def check_plain(model: Model) -> None:
    """Raises InputError for a tensor outside packed weights that does not hold floats, or whose shape contradicts
    config.json."""
    expected = Shapes(model)
    for name, role in model.roles.items():
        if role.part or role.group in UNCHANGED:
            continue
        ref = model.checkpoint.tensors[name]
        if ref.dtype not in FLOAT_DTYPES:
            raise InputError(
                f"tensor {escape(name)!r} is {ref.dtype}, but config.json has no quantization_config that states "
                "what its codes mean",
                hint="Correct config.json, or give the unquantized checkpoint.",
            )
        want = expected(role)
        if want is not None and ref.shape != want:
            raise InputError(
                f"tensor {escape(name)!r} has shape {list(ref.shape)}, but config.json requires {list(want)}"
                + _because(model, role) + ": no runtime loads this model",
                hint=f"{_TOGETHER}: download the checkpoint again.",
            )  # fmt: skip


def check_stored(model: Model) -> None:
    """Raises InputError for a packed weight with missing or wrong parts, Unsupported for a packed router."""
    for role in model.roles.values():
        if role.part and role.group == "router":
            raise Unsupported(
                f"the router of layer {role.layer} is quantized, but moeconv cuts routers by row without decoding them",
                hint="Give a checkpoint that leaves routers unquantized (modules_to_not_convert, ignore).",
            )
    _ = model.stored


def stored_weights(model: Model) -> dict[str, Stored]:
    """Every packed weight of the model, by its plain name."""
    quantization = model.quantization
    if quantization is None:
        return {}
    method, forms, expected = quantization_method(quantization), forms_of(quantization), Shapes(model)
    found: dict[str, Stored] = {}
    for weight, refs in _grouped(model).items():
        role = model.roles[next(iter(refs.values())).name]
        shape = expected(role) or (refs["weight"].shape if "weight" in refs else None)
        if shape is None:
            raise Unsupported(
                f"{escape(weight)!r} is quantized, and its shape does not follow from config.json", hint=GIVE
            )
        layout = model.family.tensors.packed.get(role.key) if role.expert is None else None
        stacked = layout is not None and not layout.flat
        possible = forms(module_names(weight, model.family), role.key == "embedding.tokens")
        if not possible:
            raise InputError(
                f"{escape(weight)!r} is stored as a quantized weight, and config.json makes it a plain one: no group's "
                "targets match it, or ignore does",
                hint="Correct quantization_config in config.json, or download it again: no runtime reads the weight.",
            )
        found[weight] = fit(weight, refs, shape, possible, stacked=stacked, method=method)
    return found


def _grouped(model: Model) -> dict[str, dict[str, TensorRef]]:
    """The tensors of every packed weight, by part. A tensor that has the weight's name counts as its codes."""
    tensors = model.checkpoint.tensors
    groups: dict[str, dict[str, TensorRef]] = {}
    for name, role in model.roles.items():
        if role.part:
            of = groups.setdefault(weight_of(name), {})
            if role.part in of:
                raise InputError(
                    f"tensors {escape(of[role.part].name)!r} and {escape(name)!r} are the same part of a weight",
                    hint="The checkpoint is damaged.",
                )
            of[role.part] = tensors[name]
    for weight, refs in groups.items():
        if "weight" not in refs and weight in tensors:
            refs["weight"] = tensors[weight]
    return groups


def _because(model: Model, role: Role) -> str:
    """The key of config.json that decides the shape, in words for an error."""
    rows = role.key in ("embedding.tokens", "embedding.lm_head")
    return f" (vocab_size = {model.value('vocab_size')})" if rows else ""


class Shapes:
    """The shapes of a model's tensors according to config.json, by role; None where they do not follow from it."""

    def __init__(self, model: Model) -> None:
        self.model, self.family = model, model.family
        self.known: dict[tuple[str, int | None, bool], tuple[int, ...] | None] = {}
        self.counts: Mapping[str, Callable[[], int]] = {
            "experts": lambda: model.num_experts,
            "width": lambda: model.ffn_width,
            "expert": lambda: model.expert_width,
            "shared": lambda: model.shared_width,
        }

    def __call__(self, role: Role) -> tuple[int, ...] | None:
        """The shape of the plain tensor of this role, as it is stored."""
        stacked = role.expert is None
        at = (role.key, role.layer if self.family.tensors.sizes else None, stacked)
        if at not in self.known:
            try:
                self.known[at] = self._find(role.key, role.layer, stacked=stacked)
            except KeyError:
                self.known[at] = None
        return self.known[at]

    def _find(self, key: str, layer: int | None, *, stacked: bool) -> tuple[int, ...]:
        layout = self.family.tensors.packed.get(key) if stacked else None
        if layout is not None:
            return self._stacked(layout)
        parts = [self.matrix(part, layer) for part in self.family.tensors.fused.get(key, (key,))]
        return (sum(shape[0] for shape in parts), *parts[0][1:])

    def matrix(self, key: str, layer: int | None) -> tuple[int, ...]:
        """The shape of the matrix `key` in a layer, not transposed. Raises KeyError if it does not follow."""
        sliding = self.model.sliding.layers if self.family.tensors.sizes else ()
        slides = layer is not None and (sliding[layer] if layer < len(sliding) else self.family.prediction.slides)
        return shape_of(
            key, self.model.value, counts=self.counts, place=Place(layer, slides), shapes=self.family.tensors.shapes,
            sizes=self.family.tensors.sizes,
        )  # fmt: skip

    def _stacked(self, layout: Packed) -> tuple[int, ...]:
        experts = self.model.num_experts
        parts = [self.matrix(f"expert.{part}", None) for part in layout.parts]
        outside, *inside = (sum(shape[0] for shape in parts), *parts[0][1:])
        one = (outside, *inside)
        one = one[::-1] if layout.transposed else one
        return (experts * one[0], *one[1:]) if layout.flat else (experts, *one)


def width_of(model: Model, *keys: str) -> int:
    """The product of config keys that must be counts."""
    product = 1
    for key in keys:
        product *= whole(model.value(key), key, limit=MAX_WIDTH)
    return product
