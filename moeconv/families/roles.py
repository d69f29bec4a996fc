"""The role of every tensor of a checkpoint, by its name. A tensor that the family does not have is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moeconv.checkpoint.header import FLOAT_DTYPES
from moeconv.checkpoint.reader import Checkpoint
from moeconv.errors import InputError, Unsupported, escape
from moeconv.families import packed, settings
from moeconv.families.names import is_cache_scale, is_head
from moeconv.families.spec import Family, Role
from moeconv.types import Config
from moeconv.units import counted


def assign_roles(checkpoint: Checkpoint, family: Family) -> tuple[dict[str, Role], tuple[str, ...]]:
    """(role of each tensor, names that no loader reads). Raises InputError for a tensor that the family does not have,
    and for more layers or experts than the checkpoint has tensors."""
    known = _known_names(checkpoint, family, settings.text_config(checkpoint.config, family))
    layers = settings.layer_count(family, settings.text_config(checkpoint.config, family))
    useless = {t.replace("{L}", str(layer)) for t in family.tensors.dropped for layer in range(layers)}
    quantized = packed.quantization(checkpoint.config) is not None
    beside = family.multimodal.beside
    roles: dict[str, Role] = {}
    dropped: list[str] = []
    for name, ref in checkpoint.tensors.items():
        role = _role_of(name, ref.dtype, known) if quantized else known.get(name)
        if role is None:
            role = _unchanged(name, family, layers)
        if role is not None:
            roles[name] = role
        elif name.startswith(tuple(beside)):
            group = next(group for start, group in beside.items() if name.startswith(start))
            roles[name] = Role(f"{group}.{name}")
        elif name in useless or is_head(name) or (quantized and is_cache_scale(name)):
            dropped.append(name)
        else:
            raise InputError(
                f"tensor {escape(name)!r} is not part of a {family.model_type} model of this config",
                hint="The checkpoint has another architecture or version than its config.json states.",
            )
    return roles, tuple(dropped)


def _unchanged(name: str, family: Family, layers: int) -> Role | None:
    """The role of a tensor of a layer that every command copies unchanged; None for other names."""
    for template, group in family.tensors.unchanged.items():
        before, after = template.split("{L}")
        number, found, rest = name.removeprefix(before).partition(after)
        if name.startswith(before) and found and number.isdecimal() and int(number) < layers:
            return Role(f"{group}.{rest}", int(number))
    return None


def _role_of(name: str, dtype: str, known: Mapping[str, Role]) -> Role | None:
    """The role of a tensor of a quantized checkpoint, which may be a part of a packed weight."""
    role, split = known.get(name), packed.split_part(name)
    of = known.get(split[0]) if split is not None else None
    if split is not None and of is not None:
        is_plain = role is not None and dtype in FLOAT_DTYPES
        return role if is_plain else Role(of.key, of.layer, of.expert, split[1])
    return replace(role, part="weight") if role is not None and dtype not in FLOAT_DTYPES else role


def _known_names(checkpoint: Checkpoint, family: Family, config: Config) -> dict[str, Role]:
    """Every name that a checkpoint of this config may hold, before any part of a packed weight."""
    layers = settings.layer_count(family, config)
    moe = settings.moe_layers(family, config, layers)
    if family.kind == "moe" and not moe and not any(map(config.get, family.experts.count)):
        raise Unsupported(
            f"config.json makes no layer of this {family.model_type} a Mixture-of-Experts",
            hint="Only models of this family with experts are supported.",
        )
    experts = settings.count(config, family.experts.count, limit=settings.MAX_EXPERTS) if family.experts.count else 0
    # checked before all names are listed: a config of a few bytes must not take gigabytes of memory
    each = experts if any("{E}" in template for template in family.tensors.names.values()) else 1
    least = max(layers, len(moe) * each)
    if least > len(checkpoint.tensors) or layers * experts > settings.MAX_IN_ALL:
        raise InputError(
            f"config.json states {counted(layers, 'layer')}"
            + (f" of {counted(experts, 'expert')}" if experts else "")
            + f", but the checkpoint has only {counted(len(checkpoint.tensors), 'tensor')}",
            hint="config.json and the shards do not belong together, or a shard is missing.",
        )  # fmt: skip
    known = dict(family.expand(layers=layers, experts=experts))
    for form in family.forms() if family.tensors.layouts else (family,):
        known |= form.expand_mtp(first=layers, count=_mtp_count(checkpoint, family, config), experts=experts)
    return known


def _mtp_count(checkpoint: Checkpoint, family: Family, config: Config) -> int:
    """Multi-token-prediction layers that the checkpoint may hold."""
    if not family.prediction.names:
        return 0
    if family.prediction.prefix:
        before = family.prediction.prefix + family.prediction.layers
        numbers = {n.removeprefix(before).partition(".")[0] for n in checkpoint.tensors if n.startswith(before)}
        return next((i for i in range(settings.MAX_MTP) if str(i) not in numbers), settings.MAX_MTP)
    count = family.config.value("num_nextn_predict_layers", config) or 0
    return min(count, settings.MAX_MTP)
