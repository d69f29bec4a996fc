"""Which dense family becomes which MoE family, exactly; and the config of the result.

A source key that the target does not have must stand at a neutral value, else the conversion is refused by name:
silent damage is what the best-known peers do here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from moeconv.errors import InputError, escape
from moeconv.families import sliding
from moeconv.families.dense import DENSE
from moeconv.families.moe import MOE
from moeconv.families.spec import Family, Pair

PAIRS: tuple[Pair, ...] = (
    Pair("llama", "mixtral", default=True),
    Pair("mistral", "mixtral", default=True),
    Pair(
        "llama",
        "qwen2_moe",
        note="zero shared expert of 128 neurons: the family cannot be without one",
        config={"qkv_bias": False, "norm_topk_prob": True, "decoder_sparse_step": 1},
        inert_shared_expert=128,
    ),
    Pair(
        "qwen2",
        "qwen2_moe",
        default=True,
        note="zero shared expert of 128 neurons: the family cannot be without one",
        config={"qkv_bias": True, "norm_topk_prob": True, "decoder_sparse_step": 1},
        inert_shared_expert=128,
    ),
    Pair("qwen3", "qwen3_moe", default=True, config={"norm_topk_prob": True, "decoder_sparse_step": 1}),
)

# Known impossible conversions, with the reason that a user should read.
IMPOSSIBLE: dict[tuple[str, str], str] = {
    ("qwen2", "mixtral"): "mixtral has no slot for the query, key and value biases of qwen2",
    ("llama", "qwen3_moe"): "qwen3_moe normalises queries and keys, which cannot be made an identity",
    ("mistral", "qwen3_moe"): "qwen3_moe normalises queries and keys, which cannot be made an identity",
    ("qwen3", "mixtral"): "mixtral does not normalise queries and keys",
    ("qwen3", "qwen2_moe"): "qwen2_moe does not normalise queries and keys",
}

# Keys of config.json that describe the file or generation, not the computation of a layer: they come along.
CARRIED = frozenset({
    "architectures", "dtype", "torch_dtype", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id",
    "unk_token_id", "use_cache", "model_type", "output_router_logits", "output_hidden_states", "output_attentions",
    "return_dict", "task_specific_params", "id2label", "label2id", "chunk_size_feed_forward", "is_encoder_decoder",
})  # fmt: skip
LEFT_OUT = frozenset({"_name_or_path", "auto_map", "_attn_implementation_autoset", "_attn_implementation"})


def find_pair(source: Family, to: str | None) -> Pair:
    """The row for `source` and the target named `to` (the default target when None). Raises InputError."""
    if source.kind != "dense":
        raise InputError(
            f"{source.model_type} is already a Mixture-of-Experts family",
            hint="upcycle takes a dense checkpoint; see `moeconv families`.",
        )
    rows = [p for p in PAIRS if p.source == source.model_type and (p.default if to is None else p.target == to)]
    if rows:
        return rows[0]
    can = ", ".join(p.target for p in PAIRS if p.source == source.model_type) or "nothing yet"
    why = IMPOSSIBLE.get((source.model_type, to or ""), f"no exact mapping from {source.model_type} to it is known")
    raise InputError(f"cannot write {source.model_type} as {escape(to)}: {why}", hint=f"It can become: {can}.")


def _fill_rope(config: dict[str, Any], theta: float) -> None:
    """Say the rotary base explicitly: families assume different ones when it is missing."""
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict):
        nested = [v for v in parameters.values() if isinstance(v, dict)]
        for entry in nested or [parameters]:
            entry.setdefault("rope_theta", config.get("rope_theta", theta))
    else:
        config.setdefault("rope_theta", theta)


def _without_nulls(config: Mapping[str, Any]) -> dict[str, Any]:
    """Null asks the source's class to derive a value; not every target's class does, so it is said or left out."""
    result = {key: value for key, value in config.items() if key != "head_dim" or value is not None}
    if "num_key_value_heads" in result and result["num_key_value_heads"] is None:
        result["num_key_value_heads"] = config.get("num_attention_heads")
    return result


def _same(value: Any, neutral: tuple[Any, ...]) -> bool:
    return any(value == n and type(value) is type(n) for n in neutral)


def target_config(pair: Pair, config: Mapping[str, Any], *, layers: int) -> tuple[dict[str, Any], list[str]]:
    """The target's config.json (without expert counts and sizes) and warnings. Raises InputError when inexact."""
    source, target = DENSE[pair.source], MOE[pair.target]
    result: dict[str, Any] = {}
    warnings: list[str] = []
    if config.get("quantization_config"):
        raise InputError("the source is quantized", hint="Upcycle the unquantized checkpoint, then `moeconv quantize`.")
    config = _without_nulls(config)
    for key, value in config.items():
        if key in LEFT_OUT or key in sliding.KEYS:
            continue
        if key in source.config and key not in target.config:
            if not _same(value, source.neutral.get(key, ())):
                raise InputError(
                    f"{pair.source} with {escape(key)} = {escape(value)} has no exact twin in {pair.target}, "
                    f"which has no such setting",
                    hint="See `moeconv families` for other targets (--to).",
                )
            continue
        if key not in source.config and key not in CARRIED:
            warnings.append(f"config key {escape(key)!r} is not known for {pair.source}: carried over unchanged")
        result[key] = copy.deepcopy(value)
    for key in source.config:
        value = source.default(key, config)
        if key in target.config and key not in sliding.KEYS and value is not None and not key.startswith("rope_"):
            result[key] = copy.deepcopy(value)
    _fill_rope(result, source.config["rope_theta"])
    sliding.check_keys({key: value for key, value in config.items() if key in source.config}, layers)
    pattern = source.sliding.read({**_sliding_defaults(source), **config}, layers)
    words = target.sliding.write(pattern)
    if words is None:
        raise InputError(
            f"{pair.source} with a sliding window in {'some' if pattern.kind == 'mixed' else 'all'} layers has no "
            f"exact twin in {pair.target}, which cannot express it",
            hint="See `moeconv families` for other targets (--to).",
        )
    sizes = {"moe_intermediate_size", "shared_expert_intermediate_size", "rope_theta", *sliding.KEYS}
    for key, value in target.config.items():
        if value is not None and key not in result and key not in sizes and not str(value).startswith("="):
            result[key] = copy.deepcopy(value)
    result |= words | dict(pair.config)
    result["model_type"], result["architectures"] = target.model_type, [target.architecture]
    return result, warnings


def _sliding_defaults(family: Family) -> dict[str, Any]:
    return {key: family.config[key] for key in sliding.KEYS if key in family.config}
