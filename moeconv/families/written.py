"""config.json as it is written: what changes under every alias that is there, and what other readers need added.

A reader of one wording takes the other for missing and silently assumes a default. Therefore both are written.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from moeconv.families.rope import added_wordings
from moeconv.families.spec import Family
from moeconv.types import Config, JsonObject

# every word in use for the same number; a published config may hold several
ALIASES: tuple[tuple[str, ...], ...] = (
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    (
        "num_experts_per_tok", "experts_per_token", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k",
        "top_k_experts",
    ),
    ("moe_intermediate_size", "expert_hidden_dim"),
    ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts"),
)  # fmt: skip


def written_config(
    config: Config, family: Family, *, changes: Config | None = None, dtype: str | None = None
) -> JsonObject:
    """A config.json with `changes` (in the words of the family's row) and the `dtype` (in those of torch), so that
    every reader reads the same from it. Everything else stays as the source has it."""
    result = copy.deepcopy(dict(config))
    nested = result.get(family.multimodal.root) if family.multimodal.root else None
    text = nested if isinstance(nested, dict) else result
    changed = _everywhere(family, text, changes or {})
    text.update(family.config.write(text, changed))
    text.update(family.config.write(text, added(family, family.config.read(text))))
    _reword(family, text)
    for part in [result] if text is result else [result, text]:
        _say_dtype(part, dtype)
    if text is not result:
        _say_tied(result, text)
    return result


def added(family: Family, values: Config) -> JsonObject:
    """What a config (in the words of the family's row) lacks for some reader: keys with their values."""

    def get(key: str) -> Any:
        return found[key] if key in found else family.config.value(key, values)

    found: JsonObject = {}
    for aliases in (family.experts.count, family.experts.top_k):
        known = next((values[key] for key in aliases if values.get(key) is not None), None)
        if known is not None:
            found |= {key: known for key in aliases if values.get(key) is None}
    if family.kind == "moe" and "rope_theta" in family.config.defaults and "rope_theta" not in family.config.words:
        found |= added_wordings(
            values, assumed=family.config.defaults.get("rope_parameters"), theta=family.config.defaults["rope_theta"],
            partial=family.attention.partial, style=family.attention.rope,
        )  # fmt: skip
    for key, value in family.elsewhere.keys.items():
        if values.get(key) is None and (made := _value(value, get)) is not None:
            found[key] = made
    return found


def other_values_elsewhere(family: Family, values: Config) -> list[str]:
    """Warnings about settings that transformers 5 alone reads."""
    others = "transformers 4, vLLM, SGLang and llama.cpp compute"
    found = [
        f"{key} = {values[key]} is read by transformers 5 alone: {others} {family.model_type} with {fixed}, so the "
        "result is right in transformers 5 only"
        for key, fixed in family.elsewhere.fixed.items()
        if values.get(key, fixed) != fixed
    ]
    slides = {word == "sliding_attention" for word in values.get("layer_types") or ()}
    if family.elsewhere.one_window and len(slides) > 1:
        found.append(
            f"layer_types is read by transformers 5 alone: {others} {family.model_type} with one window for all layers "
            "or none, so the result is right in transformers 5 only, except for prompts within the window of "
            f"{values.get('sliding_window')} tokens"
        )
    return found


def _value(rule: object, get: Callable[[str], Any]) -> Any:
    if callable(rule):
        return rule(get)
    return get(rule[1:]) if isinstance(rule, str) and rule.startswith("=") else copy.deepcopy(rule)


def _everywhere(family: Family, text: Config, changes: Config) -> JsonObject:
    """`changes`, and the new value under every alias that holds the old one: a number, or one number per layer."""
    values, changed = family.config.read(text), dict(changes)
    for key, new in changes.items():
        old = values.get(key)
        for alias in next((names for names in ALIASES if key in names), ()):
            held = text.get(alias)
            if alias in changed or held is None or old is None:
                continue
            if held == old and type(held) is type(old):
                changed[alias] = new
            elif isinstance(held, list) and held and all(each == old for each in held):
                changed[alias] = [new] * len(held)
    return changed


def _reword(family: Family, text: JsonObject) -> None:
    """Words of a list that one version of transformers does not know, in those that all know; one number for all layers
    where a reader wants one per layer; keys of a nested config that its class refuses, and keys that say what the class
    assumes and another reader cannot read, are left out."""
    for key, words in family.elsewhere.old_words.items():
        if isinstance(text.get(key), list):
            text[key] = [words.get(word, word) if isinstance(word, str) else word for word in text[key]]
    for key in family.elsewhere.per_layer:
        if isinstance(number := text.get(key), int):
            text[key] = [number] * family.config.read(text)["num_hidden_layers"]
    for key in family.elsewhere.implied:
        if key in text and text[key] == family.config.defaults.get(key):
            del text[key]
    for key, known in family.elsewhere.nested.items():
        if isinstance(text.get(key), dict):
            text[key] = {name: value for name, value in text[key].items() if name in known}


def _say_dtype(part: JsonObject, dtype: str | None) -> None:
    """The dtype in the words of transformers 5 and of transformers 4."""
    for key, other in (("dtype", "torch_dtype"), ("torch_dtype", "dtype")):
        says = dtype or part.get(key) or part.get(other)
        if says is not None:
            part[key] = says


def _say_tied(outer: JsonObject, text: JsonObject) -> None:
    """Whether the head is the embedding: transformers 5 asks the outer config, version 4 that of the language model."""
    stated = [part["tie_word_embeddings"] for part in (outer, text) if part.get("tie_word_embeddings") is not None]
    if stated:
        outer["tie_word_embeddings"] = text["tie_word_embeddings"] = any(stated)
