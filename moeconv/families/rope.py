"""Rotary position embeddings in config.json: one reading of all old and new keys, and the keys that a target is given.

Styles: "plain" (one set of parameters), "per_type" (one for full and one for sliding layers), "per_layer" (a base a
layer, 0 where the layer does not rotate), "no_rope" (plain, with a list of the layers that rotate), "mscale" (plain,
with an attention factor of its own name), "own" (per type, by rules that no other family shares: taken over as it is),
"none" (the family does not rotate).

transformers 5 reads `rope_parameters`; transformers 4, mlx-lm and the converter of llama.cpp read `rope_theta`,
`rope_scaling` and `partial_rotary_factor` beside it. What is written has both wordings.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

from moeconv.errors import InputError, escape
from moeconv.families.placement import Get
from moeconv.types import Config, JsonObject

KEYS = frozenset({
    "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "rotary_pct", "layer_rope_theta",
    "no_rope_layers", "no_rope_layer_interval", "original_max_position_embeddings",
})  # fmt: skip
_OLD_WORDS = {"su": "longrope"}
_STILL = 1e30  # a frequency divided by this does not turn at any position


def read_rope(config: Config, *, theta: float, partial: float | None) -> JsonObject:
    """The parameters of full attention in transformers' words: rope_type, rope_theta and whatever the type needs."""
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}  # as transformers 5 prefers them
    if not isinstance(found, dict):
        raise InputError("config.json: rope_parameters must be an object", hint="Correct config.json.")
    nested = found.get("full_attention")
    params = copy.deepcopy(nested if isinstance(nested, dict) else found)
    kind = params.pop("type", None)
    kind = params.get("rope_type", kind) or "default"
    params["rope_type"] = _OLD_WORDS.get(kind, kind)
    params.setdefault("rope_theta", config.get("rope_theta") or theta)
    share = config.get("partial_rotary_factor", config.get("rotary_pct", partial))
    if partial is not None:
        params.setdefault("partial_rotary_factor", share)
    length = config.get("original_max_position_embeddings")
    if params["rope_type"] == "longrope" and length is not None:
        params.setdefault("original_max_position_embeddings", length)
    return params


def check_uniform(config: Config, sliding: Sequence[bool], *, name: str) -> None:
    """Raises InputError when sliding layers turn otherwise than full ones: one set of parameters cannot express it."""
    found = config.get("rope_parameters")
    if isinstance(found, dict) and any(sliding) and found.get("sliding_attention") != found.get("full_attention"):
        raise InputError(
            f"{name} turns sliding and full layers by different rotary parameters, which the target cannot express",
            hint="See `moeconv families` for other targets (--to).",
        )


def rotating(get: Get, layers: int) -> list[bool]:
    """Which layers rotate, where config lists those that do not (no_rope_layers, or every n-th)."""
    listed = get("no_rope_layers")
    if listed is None:
        every = get("no_rope_layer_interval")
        return [not every or (i + 1) % every != 0 for i in range(layers)]
    if not isinstance(listed, list) or len(listed) != layers:
        raise InputError(f"config.json: no_rope_layers must be a list of {layers} numbers", hint="Correct it.")
    return [bool(word) for word in listed]


def spread(params: Config, *, head: int, size: int, longest: int) -> JsonObject:
    """Parameters that turn the first `size` of a head's `head` dimensions as `params` do, and leave the rest still.

    A frequency of the whole head is theta^(-2i/head) / factor[i], so factors give any frequency: the source's own for
    the pairs that turn, 1e30 for those that stand still.
    """
    kind, theta = params["rope_type"], params["rope_theta"]
    if kind not in ("default", "longrope"):
        raise InputError(
            f"partial rotary embeddings with rope type {escape(kind)} have no exact twin in the target",
            hint="See `moeconv families` for other targets (--to).",
        )
    ratio = [theta ** (2 * i / size - 2 * i / head) for i in range(size // 2)]
    still = [_STILL] * ((head - size) // 2)
    result: JsonObject = {"rope_type": "longrope", "rope_theta": theta}
    for word in ("short_factor", "long_factor"):
        own = params.get(word) or [1.0] * len(ratio)
        if len(own) != len(ratio):
            raise InputError(f"config.json: {word} must have {len(ratio)} numbers", hint="Correct config.json.")
        result[word] = [a * b for a, b in zip(ratio, own, strict=True)] + still
    result["original_max_position_embeddings"] = params.get("original_max_position_embeddings") or longest
    result["attention_factor"] = attention_factor(params, longest)
    return result


def attention_factor(params: Config, longest: int) -> float:
    """What cosines and sines are multiplied by; for longrope (Ding et al. 2024, arXiv 2402.13753) as transformers
    derives it where config does not say it."""
    if params["rope_type"] != "longrope":
        return 1.0
    stated: float | None = params.get("attention_factor")
    if stated is not None:
        return stated
    length = params.get("original_max_position_embeddings") or longest
    factor = params.get("factor") or longest / length
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(length))


def write_rope(params: Config, *, style: str, rotates: Sequence[bool]) -> JsonObject:
    """The target's config keys in its own style. Raises InputError for layers that do not rotate where all must."""
    theta = params["rope_theta"]
    if style == "mscale" and params["rope_type"] == "longrope":
        factor = params.get("attention_factor", 1.0)
        params = {"short_mscale": factor, "long_mscale": factor, **params}
    if style == "per_layer":
        thetas = [theta if turns else 0 for turns in rotates]
        return both_wordings(params) | {"layer_rope_theta": thetas}
    if not all(rotates):
        raise InputError(
            f"layer {list(rotates).index(False)} has no rotary embedding (no_rope_layers), which the target cannot "
            "express",
            hint="See `moeconv families` for other targets (--to).",
        )
    if style == "per_type":
        return {"rope_parameters": {word: dict(params) for word in ("full_attention", "sliding_attention")}}
    return both_wordings(params)


def both_wordings(params: Config) -> JsonObject:
    """One set of parameters in the words of transformers 5, and in those of transformers 4."""
    beside = ("rope_theta", "partial_rotary_factor")
    scaling = {key: copy.deepcopy(value) for key, value in params.items() if key not in beside}
    scales = params["rope_type"] != "default" or len(scaling) > 1
    # null where nothing scales: a class of transformers 4 may assume a scaling of its own
    result = {"rope_parameters": dict(params), "rope_scaling": scaling if scales else None}
    result |= {key: params[key] for key in beside if key in params}
    if params["rope_type"] == "longrope" and "original_max_position_embeddings" in params:
        result["original_max_position_embeddings"] = params["original_max_position_embeddings"]
    return result


def added_wordings(config: Config, *, assumed: object, theta: float, partial: float | None, style: str) -> JsonObject:
    """The keys of the other wording that a config.json with rotary parameters in one wording lacks. `assumed` are the
    class's parameters where config has none."""
    if style not in ("plain", "mscale"):
        return {}
    params = read_rope({"rope_parameters": assumed, **config}, theta=theta, partial=partial)
    both = both_wordings(params)
    return {key: value for key, value in both.items() if config.get(key) is None and (value is not None or
            key not in config)}  # fmt: skip
