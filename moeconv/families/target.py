"""Plans a dense model as a model of the target's family: its config.json, and the expression that makes each tensor.

A config key of the source that the target does not have must have a neutral value. Otherwise the conversion is refused
with an error that names the key, because dropping it would silently change what the model computes.
"""

from __future__ import annotations

import copy
from typing import Any

from moeconv.errors import InputError, escape
from moeconv.families import rope, sliding
from moeconv.families.folds import Draft, align_layout
from moeconv.families.head import head_warnings, untied
from moeconv.families.model import Model
from moeconv.families.node import Node, concat, cut
from moeconv.families.node import source as source_node
from moeconv.families.shapes import grouped_rows, head_dim
from moeconv.families.spec import BESIDE, Family, Pair
from moeconv.families.written import written_config
from moeconv.types import Config, JsonObject
from moeconv.units import counted

# Keys of config.json that describe the file or text generation, not what a layer computes: they are copied.
CARRIED = frozenset({
    "architectures", "dtype", "torch_dtype", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id",
    "unk_token_id", "use_cache", "model_type", "output_router_logits", "output_hidden_states", "output_attentions",
    "return_dict", "task_specific_params", "id2label", "label2id", "chunk_size_feed_forward", "is_encoder_decoder",
    "problem_type",
})  # fmt: skip
LEFT_OUT = frozenset({"_name_or_path", "auto_map", "_attn_implementation_autoset", "_attn_implementation"})
# Keys that only training reads: a target without them computes the same.
TRAINING = frozenset({
    "initializer_range", "attention_dropout", "resid_pdrop", "embd_pdrop", "residual_dropout", "hidden_dropout",
    "embedding_initializer_range", "initializer_factor",
})  # fmt: skip
_TARGETS = "See `moeconv families` for other targets (--to)."


def draft_target(model: Model, pair: Pair, target: Family) -> Draft:
    """The target's config (without the counts and sizes of experts) and the expressions of its tensors.

    Of a multimodal model it is the config of the language model alone; `whole_config` adds the rest.

    Raises InputError if the target cannot compute exactly what the source computes.
    """
    config, warnings = _target_config(model, pair, target)
    warnings += _prediction_warnings(model)
    draft = Draft(
        source=model.family,
        target=target,
        get=model.value,
        layers=model.num_layers,
        config=config,
        tensors={key: _stored(model, key) for key in _source_keys(model)},
        warnings=warnings,
        tied=bool(model.value("tie_word_embeddings")) and not model.own_head,
    )
    if model.own_head:
        draft.config = untied(draft.config, target)
        draft.warnings += head_warnings(model)
    align_layout(draft)
    for fold in pair.folds:
        fold(draft)
    _join(draft)
    if draft.tied and draft.tensors["embedding.tokens"].op != "source":
        draft.tensors.pop("embedding.lm_head", None)  # a stored copy of the tied head would be the old embedding
    return draft


def _stored(model: Model, key: str) -> Node:
    """The expression that reads a matrix of the source, from the rows of several heads where they lie apart."""
    whole = model.family.holds(key)
    if whole not in model.family.tensors.grouped:
        return source_node(key)
    ranges = grouped_rows(key, model.family.tensors.fused[whole], model.value)
    return concat(*(cut(source_node(whole), axis=0, start=start, stop=stop) for start, stop in ranges))


def _join(draft: Draft) -> None:
    """Join the matrices that the target stores in one tensor, except those of an FFN: making the experts joins them."""
    for whole, parts in draft.target.tensors.fused.items():
        if all(part in draft.tensors for part in parts) and not parts[0].startswith("ffn."):
            draft.tensors[whole] = concat(*(draft.tensors.pop(part) for part in parts))


def whole_config(model: Model, target: Family, text: Config, *, dtype: str | None) -> JsonObject:
    """The config.json of a target whose language model has the config `text`, under the key names of its row.

    A target that is a language model alone has no other settings. `dtype` is torch's name of the output's dtype.
    """
    written = target.config.write({}, text)
    root = target.multimodal.root
    if not root:
        return written_config(written, target)
    outer = model.carried_config | {"model_type": target.model_type, "architectures": [target.architecture]}
    outer["tie_word_embeddings"] = text["tie_word_embeddings"]
    for key, kind in target.multimodal.parts.items():
        if isinstance(outer.get(key), dict):
            outer[key] = {**outer[key], "model_type": kind}
    written = {key: value for key, value in written.items() if key not in ("architectures", "auto_map")}
    return written_config({**outer, root: {**written, "model_type": target.multimodal.text}}, target, dtype=dtype)


def _prediction_warnings(model: Model) -> list[str]:
    count = len(model.prediction_layers)
    text = "left out, since no class of transformers runs them; serving engines use them for speculative decoding"
    return [f"{counted(count, 'multi-token-prediction layer')} of the source: {text}"] if count else []


def _source_keys(model: Model) -> list[str]:
    """The keys of the matrices that the language model has in any of its own layers; a fused tensor counts as its
    parts."""
    keys: dict[str, None] = {}
    for name, role in model.roles.items():
        if role.group in BESIDE or model.family.predicts(name, layers=model.num_layers):
            continue
        for key in model.family.tensors.fused.get(role.key, (role.key,)):
            keys[key] = None
    return list(keys)


def _without_nulls(config: Config) -> JsonObject:
    """The config without the nulls for which the source's class derives a value, since the target's class may not."""
    result = {key: value for key, value in config.items() if key != "head_dim" or value is not None}
    if "num_key_value_heads" in result and result["num_key_value_heads"] is None:
        result["num_key_value_heads"] = config.get("num_attention_heads")
    return result


def _same(value: object, neutral: tuple[Any, ...]) -> bool:
    return any(value == n and type(value) is type(n) for n in neutral)


def _target_config(model: Model, pair: Pair, target: Family) -> tuple[JsonObject, list[str]]:
    """(the target's config.json without rotary parameters and sizes of experts, warnings about the source's config).

    The order matters: settings that the source states come first, then what follows from them, then the target's
    defaults for what is still missing, and last the values with which the pair makes the target compute what the source
    does. Defaults are written out because other runtimes assume other values than transformers for missing keys.
    """
    if model.quantization or model.config.get("quantization_config"):
        raise InputError("the source is quantized", hint="Upcycle the unquantized checkpoint, then `moeconv quantize`.")
    result, warnings = _taken_over(model, pair, target)
    result |= _sizes_of_heads(model, target, result)
    result |= _windows(model, pair, target)
    if model.family.layers.kinds and target.layers.kinds:
        result["layer_types"] = model.family.layers.kinds(model.value, model.num_layers)
    result |= _target_defaults(target, result)
    result |= pair.config
    if code := model.carried_config.get("auto_map"):  # only entries for the tokenizer's code are left in it
        result["auto_map"] = code
    result["model_type"], result["architectures"] = target.model_type, [target.architecture]
    return result, warnings


def _taken_over(model: Model, pair: Pair, target: Family) -> tuple[JsonObject, list[str]]:
    """(the source's settings under the target's key names, warnings).

    Raises InputError for a setting that affects what the source computes and that the target does not have.
    """
    family = model.family
    result: JsonObject = {}
    warnings: list[str] = []
    given = _without_nulls(_settings(model))
    # what config.json leaves out counts as the source's default, since the target's class may assume another value
    for key in dict.fromkeys(family.config.defaults) | given:
        word = pair.rename.get(key, key)
        if word is None or key in LEFT_OUT or _is_window_key(key, family):
            continue
        value = given[key] if key in given else family.config.value(key, given)
        known, has_place = key in family.config.defaults, word in target.config.defaults
        if key in TRAINING and not has_place:
            continue
        if not known and key not in CARRIED:
            if has_place:
                # the source's class ignores the key, and the target's class would obey it
                warnings.append(f"config key {escape(key)!r} has no effect for {pair.source}, and is left out")
                continue
            warnings.append(f"config key {escape(key)!r} is not known for {pair.source}, and is copied unchanged")
        if known and not has_place and key not in rope.KEYS:
            if key in given or value is not None:
                _check_neutral(key, value, pair, family)
            continue
        # `align_layout` writes the rotary parameters that the class assumes, in the style of the target
        if key in given or (value is not None and key not in rope.KEYS):
            result[word] = copy.deepcopy(value)
    return result, warnings


def _settings(model: Model) -> Config:
    """What config.json states about the language model. Of a multimodal model, settings that describe the file are
    often outside the language model's part; keys of other parts are not the language model's."""
    outer = model.checkpoint.config
    if model.family.multimodal.root:
        return {**{key: outer[key] for key in CARRIED if key in outer}, **model.config}
    if model.family.multimodal.beside:
        return {key: value for key, value in model.config.items() if key in model.family.config.defaults or key in
                CARRIED}  # fmt: skip
    return model.config


def _is_window_key(key: str, family: Family) -> bool:
    """Whether `_windows` writes the key, because the same value can mean different layers in different families."""
    return key in sliding.KEYS and (family.attention.sliding is not sliding.NEVER or key not in family.config.defaults)


def _check_neutral(key: str, value: object, pair: Pair, family: Family) -> None:
    """Raises InputError unless a setting that the target does not have has no effect at this value."""
    if not _same(value, family.config.neutral.get(key, ())):
        raise InputError(
            f"{pair.source} with {escape(key)} = {escape(value)} has no exact equivalent in {pair.target}, "
            f"which has no such setting",
            hint=_TARGETS,
        )


def _sizes_of_heads(model: Model, target: Family, found: Config) -> JsonObject:
    """Sizes that are always written, because classes derive missing ones by different rules."""
    result: JsonObject = {}
    if "num_key_value_heads" in target.config.defaults:
        result["num_key_value_heads"] = found.get("num_key_value_heads", model.value("num_attention_heads"))
    if "head_dim" in target.config.defaults:
        result["head_dim"] = head_dim(model.value)
    return result


def _target_defaults(target: Family, found: Config) -> JsonObject:
    """The target's defaults for keys without a value; they are written because other runtimes assume other defaults."""
    written_elsewhere = {*found, *rope.KEYS, *sliding.KEYS, *_sizes(target)}
    return {
        key: copy.deepcopy(value)
        for key, value in target.config.defaults.items()
        if value is not None and key not in written_elsewhere and not str(value).startswith("=")
    }


def _sizes(target: Family) -> set[str]:
    """The config keys that the planner sets once the method has chosen the experts."""
    return {
        target.experts.width,
        target.experts.dense_width,
        *target.experts.count,
        *target.experts.top_k,
        "intermediate_size",
    }


def _windows(model: Model, pair: Pair, target: Family) -> JsonObject:
    """The target's config keys for the layers with a sliding window.

    Raises InputError if the target cannot express which layers have one.
    """
    family, layers = model.family, model.num_layers
    sliding.check_keys({key: value for key, value in model.config.items() if key in family.config.defaults}, layers)
    defaults = {key: family.config.defaults[key] for key in (*sliding.KEYS, "no_rope_layers", "no_rope_layer_interval")
                if key in family.config.defaults}  # fmt: skip
    pattern = family.attention.sliding.read({**defaults, **model.config}, layers)
    words = target.attention.sliding.write(pattern)
    if words is None:
        raise InputError(
            f"{pair.source} with a sliding window in {'some' if pattern.kind == 'mixed' else 'all'} layers has no "
            f"exact equivalent in {pair.target}, which cannot express it",
            hint=_TARGETS,
        )
    return words
