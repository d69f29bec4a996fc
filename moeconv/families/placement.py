"""Which layers have a Mixture-of-Experts: reads it from a family's config, and writes a choice of layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moeconv.errors import InputError
from moeconv.families.per_layer import one_per_layer
from moeconv.types import Config

Get = Callable[[str], Any]  # a config key's value, the class's default included


@dataclass(frozen=True, slots=True)
class Placement:
    """How a family's config states which layers have experts.

    `read(get, layers)` returns the numbers of the MoE layers. `write(moe, layers, get)` returns the config keys, or
    None if the family's config cannot express that choice. `can` names the layers that may stay dense, for error
    messages, and `keys` the config keys that state the layers.
    """

    read: Callable[[Get, int], tuple[int, ...]]
    write: Callable[[Sequence[int], int, Get], Config | None]
    can: str
    keys: tuple[str, ...] = ()


def _whole(get: Get, key: str, *, least: int) -> int:
    value = get(key)
    if type(value) is not int or value < least:
        raise InputError(f"config.json: {key} must be a {'positive ' if least else ''}whole number", hint="Correct it.")
    return value


def _read_every(_get: Get, layers: int) -> tuple[int, ...]:
    return tuple(range(layers))


def _write_every(moe: Sequence[int], layers: int, _get: Get) -> Config | None:
    return {} if len(moe) == layers else None


def _read_list(get: Get, layers: int) -> tuple[int, ...]:
    dense = get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(i) is int for i in dense):
        raise InputError("config.json: mlp_only_layers must be a list of layer numbers", hint="Correct it.")
    step = _whole(get, "decoder_sparse_step", least=1)
    left_dense = set(dense)
    return tuple(i for i in range(layers) if (i + 1) % step == 0 and i not in left_dense)


def _write_list(moe: Sequence[int], layers: int, _get: Get) -> Config | None:
    return {"mlp_only_layers": [i for i in range(layers) if i not in moe], "decoder_sparse_step": 1}


def _prefix(key: str) -> Placement:
    def read(get: Get, layers: int) -> tuple[int, ...]:
        return tuple(range(min(layers, _whole(get, key, least=0)), layers))

    def write(moe: Sequence[int], layers: int, _get: Get) -> Config | None:
        first = layers - len(moe)
        return {key: first} if list(moe) == list(range(first, layers)) else None

    return Placement(read, write, "only the first layers", (key,))


def _words(missing: Callable[[int], str]) -> Placement:
    """mlp_layer_types, one word per layer; `missing` is the family's rule if config.json has no such list."""

    def read(get: Get, layers: int) -> tuple[int, ...]:
        words = get("mlp_layer_types")
        if words is None:
            words = [missing(i) for i in range(layers)]
        words = one_per_layer(words, layers, "mlp_layer_types")
        return tuple(i for i in range(layers) if words[i] == "sparse")

    def write(moe: Sequence[int], layers: int, _get: Get) -> Config | None:
        return {"mlp_layer_types": ["sparse" if i in moe else "dense" for i in range(layers)]}

    return Placement(read, write, "any layer", ("mlp_layer_types",))


def _read_words_or_first(get: Get, layers: int) -> tuple[int, ...]:
    return (WORDS if get("mlp_layer_types") is not None else FIRST_K).read(get, layers)


def _read_period(get: Get, layers: int) -> tuple[int, ...]:
    period, offset = _whole(get, "expert_layer_period", least=1), _whole(get, "expert_layer_offset", least=0)
    return tuple(i for i in range(layers) if i % period == offset)


def _read_moe_layers(get: Get, layers: int) -> tuple[int, ...]:
    chosen = get("moe_layers")
    if chosen is None:
        step = _whole(get, "interleave_moe_layer_step", least=1)
        chosen = list(range(step - 1, layers, step))
    if not isinstance(chosen, list) or not all(type(i) is int and 0 <= i < layers for i in chosen):
        raise InputError(f"config.json: moe_layers must be a list of layers 0 to {layers - 1}", hint="Correct it.")
    return tuple(sorted(set(chosen)))


def _read_range(get: Get, layers: int) -> tuple[int, ...]:
    first, last = _whole(get, "moe_layer_start_index", least=0), get("moe_layer_end_index")
    if last is None or last == -1:
        last = layers - 1
    if type(last) is not int or last < 0:
        raise InputError("config.json: moe_layer_end_index must be a whole number", hint="Correct it.")
    step = _whole(get, "moe_layer_interval", least=1)
    return tuple(i for i in range(layers) if first <= i <= last and (i + 1) % step == 0)


def _write_range(moe: Sequence[int], _layers: int, _get: Get) -> Config | None:
    if not moe or list(moe) != list(range(moe[0], moe[-1] + 1)):
        return None
    return {"moe_layer_start_index": moe[0], "moe_layer_end_index": moe[-1], "moe_layer_interval": 1}


EVERY = Placement(_read_every, _write_every, "no layer")
LIST = Placement(_read_list, _write_list, "any layer", ("mlp_only_layers", "decoder_sparse_step"))
FIRST_K = _prefix("first_k_dense_replace")
NUM_DENSE = _prefix("num_dense_layers")
WORDS = _words(lambda _i: "sparse")
WORDS_FIRST_DENSE = _words(lambda i: "dense" if i == 0 else "sparse")
WORDS_FIRST_THREE_DENSE = _words(lambda i: "dense" if i < 3 else "sparse")
RANGE = Placement(
    _read_range,
    _write_range,
    "layers before and after one range",
    ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"),
)
WORDS_OR_FIRST_K = Placement(_read_words_or_first, WORDS.write, WORDS.can, (*WORDS.keys, *FIRST_K.keys))
PERIOD = Placement(
    _read_period,
    lambda _moe, _layers, _get: None,
    "every layer but one in each period",
    ("expert_layer_period", "expert_layer_offset"),
)
MOE_LAYERS = Placement(
    _read_moe_layers,
    lambda moe, _layers, _get: {"moe_layers": list(moe)},
    "any layer",
    ("moe_layers", "interleave_moe_layer_step"),
)


def switch(key: str) -> Placement:
    """Every layer has experts if a config key is true, none otherwise."""
    can = "all layers or none"
    return Placement(
        lambda get, layers: tuple(range(layers)) if get(key) else (),
        lambda moe, layers, _get: {key: bool(moe)} if len(moe) in (0, layers) else None,
        can,
        (key,),
    )


def of_kinds(kinds: Callable[[Get, int], list[str]]) -> Placement:
    """For layers of one block each, whose kinds `kinds` lists: the MoE layers are "moe" instead of "mlp"."""

    def read(get: Get, layers: int) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(kinds(get, layers)) if kind == "moe")

    def write(moe: Sequence[int], layers: int, get: Get) -> Config | None:
        words = ["mlp" if kind == "moe" else kind for kind in kinds(get, layers)]
        return {"layer_types": ["moe" if i in moe else kind for i, kind in enumerate(words)]}

    return Placement(read, write, "any layer", ("layer_types",))
