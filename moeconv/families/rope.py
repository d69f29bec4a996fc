"""Rotary position embeddings in config.json: reads all old and new keys alike, and writes the keys of a target.

Styles of config.json:
 - "plain": one set of parameters
 - "per_type": one set for full and one for sliding layers
 - "per_layer": one base per layer, 0 where the layer does not rotate
 - "no_rope": plain, with a list of the layers that rotate
 - "mscale": plain, with another name for the attention factor
 - "own": per type, by rules that no other family shares; copied unchanged
 - "none": the family does not rotate

transformers 5 reads `rope_parameters`. transformers 4, mlx-lm and the converter of llama.cpp read `rope_theta`,
`rope_scaling` and `partial_rotary_factor` at the top level. The written config.json has both.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

from moeconv.errors import InputError, escape
from moeconv.families.per_layer import one_per_layer
from moeconv.families.placement import Get
from moeconv.types import Config, JsonObject

KEYS = frozenset({
    "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "rotary_pct", "layer_rope_theta",
    "no_rope_layers", "no_rope_layer_interval", "original_max_position_embeddings",
})  # fmt: skip
_OLD_WORDS = {"su": "longrope", "mrope": "default"}
# keys that divide the pairs of a head between the positions in time, height and width, which are equal in text
SECTIONS = ("mrope_section", "mrope_interleaved")
_STILL = 1e30  # divided by this, a frequency is so low that no position is rotated


def read_rope(config: Config, *, theta: float, partial: float | None) -> JsonObject:
    """The parameters of full attention under transformers 5's names: rope_type, rope_theta and what the type needs.

    `theta` and `partial` (None: the whole head rotates) are the family's values where config.json has none. Raises
    InputError if the parameters are not an object.
    """
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


def table_of_length(get: Get, length: int) -> tuple[int, ...]:
    """A value that is equal for two lengths of a sequence, in tokens, only if its rotary frequencies are: "longrope"
    has others beyond the original context length. Those of "dynamic" change only beyond the maximum length."""
    found, key = get("rope_scaling") or get("rope_parameters") or {}, "original_max_position_embeddings"
    table = []
    for params in [found, *found.values()] if isinstance(found, dict) else []:
        kind = params.get("rope_type", params.get("type")) if isinstance(params, dict) else None
        if kind in ("longrope", "su"):
            limits = (params.get(key), get(key), get("max_position_embeddings"))
            table.append(sum(length > limit for limit in limits if limit and isinstance(limit, int)))
    return tuple(table)


def check_uniform(config: Config, sliding: Sequence[bool], *, name: str) -> None:
    """Raises InputError if sliding and full layers have different rotary parameters, which one set cannot express."""
    found = config.get("rope_parameters")
    if isinstance(found, dict) and any(sliding) and found.get("sliding_attention") != found.get("full_attention"):
        raise InputError(
            f"{name} rotates sliding and full layers by different parameters, which the target cannot express",
            hint="See `moeconv families` for other targets (--to).",
        )


def rotating(get: Get, layers: int) -> list[bool]:
    """Whether each layer rotates, by no_rope_layers (one truth value per layer, true where it rotates).

    Without that list every no_rope_layer_interval-th layer does not rotate. Raises InputError for a list of another
    length.
    """
    listed = get("no_rope_layers")
    if listed is None:
        every = get("no_rope_layer_interval")
        return [not every or (i + 1) % every != 0 for i in range(layers)]
    return [bool(word) for word in one_per_layer(listed, layers, "no_rope_layers", noun="number")]


def spread(params: Config, *, head: int, size: int, longest: int) -> JsonObject:
    """Parameters that rotate the first `size` of a head's `head` dimensions as `params` do, and not the rest.

    The type "longrope" rotates pair i of the whole head by the frequency theta^(-2i/head) / factor[i], so its factors
    can express any frequency: the source's own for the pairs that rotate, and practically 0 (a factor of 1e30) for the
    others. `longest` is the context length in tokens. Raises InputError for a rope type that this cannot express.
    """
    kind, theta = params["rope_type"], params["rope_theta"]
    if kind not in ("default", "longrope"):
        raise InputError(
            f"partial rotary embeddings with rope type {escape(kind)} have no exact equivalent in the target",
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
    """The factor by which cosines and sines are multiplied.

    For longrope (Ding et al. 2024, arXiv 2402.13753) without a stated factor, it is derived as transformers does.
    """
    if params["rope_type"] != "longrope":
        return 1.0
    stated: float | None = params.get("attention_factor")
    if stated is not None:
        return stated
    length = params.get("original_max_position_embeddings") or longest
    factor = params.get("factor") or longest / length
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(length))


def write_rope(params: Config, *, style: str, rotates: Sequence[bool]) -> JsonObject:
    """The rotary parameters as config keys in the target's style.

    `rotates` has one entry per layer. Raises InputError if some layer does not rotate and the style cannot express it.
    """
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
    """One set of parameters under the keys of transformers 5 and under those of transformers 4."""
    beside = ("rope_theta", "partial_rotary_factor")
    scaling = {key: copy.deepcopy(value) for key, value in params.items() if key not in beside}
    scales = params["rope_type"] != "default" or len(scaling) > 1
    # null if nothing is scaled: without the key, a class of transformers 4 may assume a scaling of its own
    result = {"rope_parameters": dict(params), "rope_scaling": scaling if scales else None}
    result |= {key: params[key] for key in beside if key in params}
    if params["rope_type"] == "longrope" and "original_max_position_embeddings" in params:
        result["original_max_position_embeddings"] = params["original_max_position_embeddings"]
    return result


def added_wordings(config: Config, *, assumed: object, theta: float, partial: float | None, style: str) -> JsonObject:
    """The rotary keys that a config.json lacks because it was written for only one version of transformers.

    `assumed` are the parameters that the class assumes if config.json has none.
    """
    if style not in ("plain", "mscale"):
        return {}
    params = read_rope({"rope_parameters": assumed, **config}, theta=theta, partial=partial)
    both = both_wordings(params)
    return {key: value for key, value in both.items() if config.get(key) is None and (value is not None or
            key not in config)}  # fmt: skip
