"""Finds the row for a config.json by its model_type, or states why the model is not supported."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace

from moeconv.errors import Unsupported, escape
from moeconv.families.refused import UNSUPPORTED, WITHOUT_ROW, WITHOUT_TARGET
from moeconv.families.registry import tables
from moeconv.families.spec import Family
from moeconv.types import Config, JsonObject

_LIST = "`moeconv families` lists what is supported; `moeconv inspect` and `verify` accept any checkpoint."
_TEXT_ROOTS = ("text_config", "llm_config", "language_config", "thinker_config")
# keys of config.json that only models with more than a language model have
_BESIDE_TEXT = (
    "vision_config", "audio_config", "vision_tower", "mm_vision_tower", "visual", "thinker_config", "image_token_id",
    "image_token_index", "vision_start_token_id", "audio_token_id", "img_processor", "embd_layer",
)  # fmt: skip


def accepted() -> dict[str, tuple[str, ...]]:
    """Every model_type that `find_family` accepts, under "dense", "moe" (a few are in both) and "multimodal"."""
    known = tables()
    return {
        "dense": tuple(sorted(known.dense)), "moe": tuple(sorted(known.moe)), "multimodal": tuple(sorted(known.wrapped))
    }  # fmt: skip


def without_aliases(config: Config) -> tuple[JsonObject, dict[str, str]]:
    """A config.json whose model_type, and that of the language model in it, are those that transformers has a class
    for, and {model_type that was replaced: the new one}."""
    known, result = tables().aliases, dict(config)
    found: dict[str, str] = {}
    for key in ("", *_TEXT_ROOTS):
        part = result if not key else result.get(key)
        stated = part.get("model_type") if isinstance(part, Mapping) else None
        if isinstance(part, Mapping) and isinstance(stated, str) and stated in known:
            found[stated] = known[stated]
            result |= {"model_type": known[stated]} if not key else {key: {**part, "model_type": known[stated]}}
    return result, found


def find_family(config: Config) -> Family:
    """The row for a config.json. Raises Unsupported for an architecture that no step accepts."""
    config, _ = without_aliases(config)
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise Unsupported(f"unknown architecture: model_type {escape(model_type)!r}", hint=_LIST)
    known = tables()
    if model_type in known.wrapped:
        return _find_wrapped(known.wrapped[model_type], known.wrapped_dense[model_type], config)
    if model_type in known.families:
        plain = known.dense.get(model_type)
        whole = known.families[model_type]
        return plain if plain is not None and _is_plain(plain, whole, config) else whole
    if model_type in UNSUPPORTED:
        raise Unsupported(f"{model_type} is not supported: {UNSUPPORTED[model_type]}", hint=_LIST)
    if model_type in WITHOUT_TARGET:
        raise Unsupported(
            f"{model_type} cannot become a Mixture-of-Experts of any stock family: {WITHOUT_TARGET[model_type]}",
            hint=_LIST,
        )
    if beside := [key for key in config if key in _BESIDE_TEXT and config[key] is not None]:
        text = _language_model(config)
        raise Unsupported(
            f"{escape(model_type)} is a multimodal model ({beside[0]} in config.json) around {text}, and moeconv does "
            "not know which of its tensors are the language model and how that runs alone",
            hint="`moeconv families` lists the supported multimodal models. For others, give the language model as a "
            "separate checkpoint.",
        )
    if model_type in WITHOUT_ROW:
        raise Unsupported(f"{model_type} is not supported: {WITHOUT_ROW[model_type]}", hint=_LIST)
    if config.get("is_encoder_decoder") is True:
        raise Unsupported(
            f"{escape(model_type)} is an encoder-decoder model, but moeconv supports only decoders",
            hint=_LIST,
        )
    own = "; its class is code in the checkpoint (auto_map), which moeconv never runs" if "auto_map" in config else ""
    raise Unsupported(f"unknown architecture: model_type {escape(model_type)!r}{own}", hint=_near(model_type))


def _near(model_type: str) -> str:
    close = difflib.get_close_matches(model_type, [*tables().families, *tables().wrapped], n=1)
    return f"Did you mean {close[0]}? {_LIST}" if close else _LIST


def _language_model(config: Config) -> str:
    """The language model inside a multimodal model, in words, as far as config.json describes it."""
    nested = ((key, part) for key, part in config.items() if isinstance(part, Mapping) and key in _TEXT_ROOTS)
    key, text = next(nested, ("", config))
    experts = any("expert" in word and isinstance(n, int) and n > 1 for word, n in text.items())
    name = text.get("model_type") if key else None
    known = tables()
    kind = "Mixture-of-Experts" if experts or (name in known.moe and name not in known.dense) else "dense"
    return f"{escape(name)}, a {kind} language model" if name else f"a {kind} language model"


def _find_wrapped(rows: Mapping[str, Family], dense: Mapping[str, Family], config: Config) -> Family:
    """The row of a multimodal model, by the language model in it. `rows` are those of the multimodal family by the
    model_type of the language model, and `dense` its dense rows."""
    first = next(iter(rows.values()))
    model_type, root = first.model_type, first.multimodal.root
    older = tables().wrappers[model_type].old_root
    if older and root not in config and older in config:
        root = older
        rows, dense = ({t: replace(r, multimodal=replace(r.multimodal, root=root)) for t, r in some.items()}
                       for some in (rows, dense))  # fmt: skip
    nested = config.get(root)
    if nested is None and tables().wrappers[model_type].flat:
        return replace(first, multimodal=replace(first.multimodal, root=""))
    text = nested.get("model_type") if isinstance(nested, dict) else None
    if text is None and len(rows) == 1:
        text = next(iter(rows))
    if not isinstance(text, str) or text not in rows:
        raise Unsupported(
            f"{model_type} around {escape(text)!r} (config.json: {root}.model_type) is not known",
            hint=f"Known in {model_type}: {', '.join(sorted(rows))}.",
        )
    plain, whole = dense.get(text), rows[text]
    stated = nested if isinstance(nested, dict) else {}
    return plain if plain is not None and plain is not whole and _is_plain(plain, whole, stated) else whole


def _is_plain(plain: Family, family: Family, config: Config) -> bool:
    """Whether config is that of the dense row `plain` of a family whose row with experts is `family`."""
    stated = family.config.read(config)
    return plain.is_dense is not None and plain.is_dense(lambda key: family.config.value(key, stated))
