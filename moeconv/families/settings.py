"""The settings of a model's text part in config.json, in the words of the tables, and its counts, checked.

A key that is usually a number may be a list with one entry per layer; a list of equal entries is read as that number.
"""

from __future__ import annotations

from moeconv.errors import InputError, escape
from moeconv.families.kinds import counts_something
from moeconv.families.spec import Family
from moeconv.types import Config
from moeconv.units import counted

MAX_LAYERS = 4096
MAX_EXPERTS = 65536
MAX_IN_ALL = 1 << 20  # experts of all layers
MAX_WIDTH = 1 << 24
MAX_MTP = 16  # multi-token-prediction layers
_CORRECT = "Correct config.json, or download it again."


def text_config(config: Config, family: Family) -> Config:
    """The part of config.json that describes the text model. Raises InputError if that is not an object, and for a
    setting that differs between layers although all layers must share it."""
    if not family.multimodal.root:
        return _same_in_all(family.config.read(config), family)
    text = config.get(family.multimodal.root)
    if not isinstance(text, dict):
        raise InputError(
            f"config.json: {family.multimodal.root} must be an object with the language model's settings, found "
            f"{escape(text)[:80]}",
            hint=_CORRECT,
        )
    # the classes read the outer key; files older than transformers 5 have the inner one
    tied = [part["tie_word_embeddings"] for part in (config, text) if part.get("tie_word_embeddings") is not None]
    stated = {"tie_word_embeddings": next((x for x in tied if x), tied[0])} if tied else {}
    return {**_same_in_all(family.config.read(text), family), **stated}


def _same_in_all(config: Config, family: Family) -> Config:
    """The config with a number in place of each list that repeats it for every layer."""
    lists = {
        key: value
        for key, value in config.items()
        if isinstance(value, list) and value and all(type(x) is int for x in value) and counts_something(family, key)
    }
    for key, value in lists.items():
        layers = config.get("num_hidden_layers")
        if type(layers) is int and layers != len(value):
            raise InputError(
                f"config.json: {key} has {counted(len(value), 'entry', 'entries')} for {counted(layers, 'layer')}",
                hint=_CORRECT,
            )
        other = next((i for i, x in enumerate(value) if x != value[0]), None)
        if other is not None:
            raise InputError(
                f"config.json: {key} differs from layer to layer: {value[0]} in layer 0, {value[other]} in layer "
                f"{other}",
                hint="Only models whose layers all have the same value are supported.",
            )
    return {**config, **{key: value[0] for key, value in lists.items()}} if lists else config


def count(config: Config, aliases: tuple[str, ...], *, limit: int) -> int:
    """The number that one of these keys states. Raises InputError if they contradict each other."""
    found = {a: config[a] for a in aliases if config.get(a) is not None}
    if len(set(map(repr, found.values()))) > 1:
        raise InputError(
            f"config.json contradicts itself: {', '.join(f'{k} = {escape(v)}' for k, v in found.items())}",
            hint="Correct config.json.",
        )
    return whole(next(iter(found.values()), None), " or ".join(aliases), limit=limit)


def whole(value: object, key: str, *, limit: int) -> int:
    """The value as a whole number from 1 to `limit`. Raises InputError for any other value."""
    if type(value) is not int or not 0 < value <= limit:
        raise InputError(
            f"config.json: {key} must be a whole number from 1 to {limit}, found {escape(value)}", hint=_CORRECT
        )
    return value


def layer_count(family: Family, config: Config) -> int:
    """The number of decoder layers. Raises InputError for one that is not a whole number within the limit."""
    found = family.layers.count(lambda key: family.config.value(key, config))
    return whole(found, "num_hidden_layers", limit=MAX_LAYERS)


def moe_layers(family: Family, config: Config, layers: int) -> tuple[int, ...]:
    """Indices of the layers whose FFN is a Mixture-of-Experts."""
    if family.kind != "moe":
        return ()
    return family.experts.placement.read(lambda key: family.config.value(key, config), layers)


def layer_kinds(family: Family, config: Config, layers: int) -> tuple[str, ...] | None:
    """The kind of each layer in a family that mixes kinds, else None."""
    if family.layers.kinds is None:
        return None
    kinds = family.layers.kinds(lambda key: family.config.value(key, config), layers)
    if not isinstance(kinds, list) or len(kinds) != layers or not all(isinstance(k, str) for k in kinds):
        raise InputError(
            f"config.json: layer_types must be a list of {counted(layers, 'word')}", hint="Correct config.json."
        )
    return tuple(kinds)
