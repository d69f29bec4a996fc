"""The config.json of an output: changed values under all their aliases, and the keys that other readers need.

Readers know one of several names of a key. If they find only another name, they silently assume a default. Therefore
every name is written.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from moeconv.families.rope import added_wordings
from moeconv.families.spec import Family
from moeconv.types import Config, JsonObject

# all key names in use for the same number; a published config may have several of them
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
    """A copy of a config.json with `changes` and `dtype`, worded so that every reader reads the same from it.

    `changes` has the key names of the family's row, `dtype` is torch's name of a dtype. Everything else stays as in
    the source.
    """
    result = copy.deepcopy(dict(config))
    nested = result.get(family.multimodal.root) if family.multimodal.root else None
    text = nested if isinstance(nested, dict) else result
    changed = _everywhere(family, text, changes or {})
    text.update(family.config.write(text, changed))
    text.update(family.config.write(text, added(family, family.config.read(text))))
    _reword(family, text)
    for part in [result] if text is result else [result, text]:
        _write_dtype(part, dtype)
    if text is not result:
        _write_tied(result, text)
    return result


def added(family: Family, values: Config) -> JsonObject:
    """The keys, with values, that some reader needs and `values` lacks (under the key names of the family's row)."""

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
    return found | {key: None for key in family.elsewhere.nulls if key not in values}


def other_values_elsewhere(family: Family, values: Config) -> list[str]:
    """Warnings about settings that only transformers 5 reads, and about those that other readers ignore."""
    others = "transformers 4, vLLM, SGLang and llama.cpp compute"
    found = [
        f"{key} = {values[key]} is read by transformers 5 alone: {others} {family.model_type} with {fixed}, so the "
        "result is right in transformers 5 only"
        for key, fixed in family.elsewhere.fixed.items()
        if values.get(key, fixed) != fixed
    ]
    found += [
        f"{key} = {values[key]} is ignored by {readers}: they compute {family.model_type} with {fixed}, so the result "
        "is wrong there"
        for key, (fixed, readers) in family.elsewhere.ignored.items()
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
    """`changes`, and the new value under every alias that has the old one, as one number or as one number per layer."""
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
    """Reword a config in place for the readers that the family's row lists in `elsewhere`.

    List entries that one version of transformers does not know are replaced by names that every version knows. A single
    number becomes a list with one entry per layer where a reader requires that. Keys that the class of a nested config
    refuses are removed, and so are keys that only state the class's default and that some reader cannot read.
    """
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


def _write_dtype(part: JsonObject, dtype: str | None) -> None:
    """Write the dtype under the key of transformers 5 and under that of transformers 4."""
    for key, other in (("dtype", "torch_dtype"), ("torch_dtype", "dtype")):
        value = dtype or part.get(key) or part.get(other)
        if value is not None:
            part[key] = value


def _write_tied(outer: JsonObject, text: JsonObject) -> None:
    """Write tie_word_embeddings into both configs: transformers 5 reads the outer one, version 4 the inner one."""
    stated = [part["tie_word_embeddings"] for part in (outer, text) if part.get("tie_word_embeddings") is not None]
    if stated:
        outer["tie_word_embeddings"] = text["tie_word_embeddings"] = any(stated)
