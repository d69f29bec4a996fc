"""Sliding-window attention: reads from a family's config which layers have a window, and writes it for another family.

A pattern is one bool per layer and the window's length in tokens. Families differ in the keys and in the rule that
fills in a missing `layer_types`, so the same keys and values can mean different layers in two families.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moeconv.errors import InputError, escape
from moeconv.families.per_layer import one_per_layer
from moeconv.types import Config, JsonObject


@dataclass(frozen=True, slots=True)
class Pattern:
    """Which layers attend through a window, and its length in tokens (None when no layer does)."""

    layers: tuple[bool, ...]
    window: int | None

    @property
    def kind(self) -> str:
        return "none" if not any(self.layers) else "all" if all(self.layers) else "mixed"


@dataclass(frozen=True, slots=True)
class Sliding:
    """How a family's config states the windows.

    `read(config, layers)` returns the pattern of a model with that number of layers. `write(pattern)` returns the
    config keys, or None if the family's config cannot express the pattern.
    """

    read: Callable[[Config, int], Pattern]
    write: Callable[[Pattern], JsonObject | None]


def _uniform(on: bool, window: int | None, layers: int) -> Pattern:
    return Pattern((on,) * layers, window if on else None)


def _read_window_key(config: Config, layers: int) -> Pattern:
    window = config.get("sliding_window")
    return _uniform(window is not None, window, layers)


def _write_window_key(pattern: Pattern) -> JsonObject | None:
    return None if pattern.kind == "mixed" else {"sliding_window": pattern.window}


def _read_switch(config: Config, layers: int) -> Pattern:
    window = config.get("sliding_window")
    return _uniform(bool(config.get("use_sliding_window")) and window is not None, window, layers)


def _write_switch(pattern: Pattern) -> JsonObject | None:
    if pattern.kind == "mixed":
        return None
    return {"use_sliding_window": pattern.kind == "all", "sliding_window": pattern.window}


def _read_layer_types(config: Config, layers: int) -> Pattern:
    """Qwen2 and Qwen3: layers from max_window_layers on have a window, unless layer_types lists the layers."""
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    types = config.get("layer_types")
    if types is None:
        first = config.get("max_window_layers", 0)
        return Pattern(tuple(window is not None and i >= first for i in range(layers)), window)
    slides = tuple(t == "sliding_attention" for t in types)
    return Pattern(slides, window if any(slides) else None)


def _read_layer_types_alternating(config: Config, layers: int) -> Pattern:
    """Qwen2-MoE: without layer_types, every second layer below max_window_layers has a window."""
    if config.get("layer_types") is None:
        on, first = bool(config.get("use_sliding_window")), config.get("max_window_layers", 0)
        window = config.get("sliding_window") if on else None
        return Pattern(tuple(on and i % 2 == 0 and i < first for i in range(layers)), window)
    return _read_layer_types(config, layers)


def _write_layer_types(pattern: Pattern) -> JsonObject | None:
    return {
        "use_sliding_window": pattern.kind != "none",
        "sliding_window": pattern.window,
        "max_window_layers": len(pattern.layers) if pattern.kind == "none" else 0,
        "layer_types": ["sliding_attention" if s else "full_attention" for s in pattern.layers],
    }


def typed(slides: Callable[[int, Config], bool], *, idle: int | None = None) -> Sliding:
    """A family with the keys layer_types and sliding_window.

    `slides(i, config)` is the class's rule for layer i if config.json has no layer_types. `idle` is the window that is
    written if no layer has one, for classes that require a number.
    """

    def read(config: Config, layers: int) -> Pattern:
        window, types = config.get("sliding_window"), config.get("layer_types")
        if types is None:
            found = tuple(bool(window is not None and slides(i, config)) for i in range(layers))
        else:
            found = tuple(window is not None and t == "sliding_attention" for t in types)
        return Pattern(found, window if any(found) else None)

    def write(pattern: Pattern) -> JsonObject | None:
        words = ["sliding_attention" if s else "full_attention" for s in pattern.layers]
        return {"sliding_window": pattern.window or idle, "layer_types": words}

    return Sliding(read, write)


def _read_full_at_the_end(config: Config, layers: int) -> Pattern:
    """Gemma 4: five of six layers have a window; the last layer never has one, whatever layer_types contains."""
    found = typed(lambda i, _config: (i + 1) % 6 != 0).read(config, layers).layers
    found = (*found[:-1], False)
    return Pattern(found, config.get("sliding_window") if any(found) else None)


def _read_between_the_ends(config: Config, layers: int) -> Pattern:
    """Flint: full attention in the first two layers, in every fourth layer after them, and in the last one."""
    return typed(lambda i, _config: i > 1 and i % 4 != 1 and i != layers - 1).read(config, layers)


def _read_sixth_and_last(config: Config, layers: int) -> Pattern:
    """Beam: full attention in every sixth layer and in the last one."""
    return typed(lambda i, _config: (i + 1) % 6 != 0 and i != layers - 1).read(config, layers)


def _read_switched_types(config: Config, layers: int) -> Pattern:
    """SmolLM3: the layers without rotary embeddings have a window, unless layer_types lists the layers."""
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    types, rotates = config.get("layer_types"), config.get("no_rope_layers")
    if types is None:
        every = config.get("no_rope_layer_interval") or 4
        turns = rotates if isinstance(rotates, list) else [(i + 1) % every != 0 for i in range(layers)]
        types = ["full_attention" if turn else "sliding_attention" for turn in turns]
    # where layer_types is set, the class reads nothing else
    found = tuple(window is not None and t == "sliding_attention" for t in types)
    return Pattern(found, window if any(found) else None)


def _read_never(_config: Config, layers: int) -> Pattern:
    return Pattern((False,) * layers, None)


def _write_never(pattern: Pattern) -> JsonObject | None:
    return {} if pattern.kind == "none" else None


def check_keys(config: Config, layers: int) -> None:
    """Raises InputError if the value of a window key has the wrong type, or layer_types has the wrong length."""
    for key, needed in (("sliding_window", False), ("max_window_layers", bool(config.get("use_sliding_window")))):
        value = config.get(key, 0)
        if (needed or value is not None) and (type(value) is not int or value < 0):
            raise InputError(f"config.json: {key} must be a whole number, found {escape(value)}", hint="Correct it.")
    types = config.get("layer_types")
    if types is not None:
        one_per_layer(types, layers, "layer_types")


def _every(config: Config) -> int:
    value = config.get("sliding_window_pattern")
    return value if type(value) is int and value > 0 else 4


NEVER = Sliding(_read_never, _write_never)
WINDOW_KEY = Sliding(_read_window_key, _write_window_key)
SWITCH = Sliding(_read_switch, _write_switch)
LAYER_TYPES = Sliding(_read_layer_types, _write_layer_types)
LAYER_TYPES_ALTERNATING = Sliding(_read_layer_types_alternating, _write_layer_types)
ALL_LAYERS = typed(lambda _i, _config: True)
ALL_BUT_EVERY_FOURTH = typed(lambda i, _config: i % 4 != 0, idle=4096)
ALL_BUT_LAST_OF_FOUR = typed(lambda i, config: (i + 1) % _every(config) != 0, idle=4096)
ALL_BUT_LAST_OF_FIVE = typed(lambda i, _config: (i + 1) % 5 != 0, idle=4096)
EVERY_SECOND = typed(lambda i, _config: i % 2 == 0, idle=4096)
FULL_AT_THE_END = Sliding(_read_full_at_the_end, typed(lambda _i, _config: False, idle=512).write)
BETWEEN_THE_ENDS = Sliding(_read_between_the_ends, typed(lambda _i, _config: False, idle=4096).write)
ALL_BUT_SIXTH_AND_LAST = Sliding(_read_sixth_and_last, BETWEEN_THE_ENDS.write)
SWITCHED_TYPES = Sliding(_read_switched_types, _write_never)
ALL_BUT_LAST_OF_SIX = typed(lambda i, _config: i != 0 and (i + 1) % 6 != 0, idle=4096)  # the first is full too
ALL_BUT_GLOBAL = typed(lambda i, config: (i + 1) % (config.get("global_attn_every_n_layers") or 4) != 0, idle=4096)
FROM_MAX_WINDOW = typed(lambda i, config: i >= (config.get("max_window_layers") or 0))
NO_LAYER = typed(lambda _i, _config: False)
KEYS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
