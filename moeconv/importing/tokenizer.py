"""tokenizer.json from the tokens of a GGUF file: the reverse of quantize/gguf/tokenizer.py."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TypeVar

from moeconv.checkpoint.gguf_source import GgufSource
from moeconv.errors import InputError, Unsupported, escape
from moeconv.quantize.gguf.pre_tokenizers import BYTES, DIGITS, GPT2, NAMES, Steps
from moeconv.types import JsonObject

_Kind = TypeVar("_Kind")
# ggml's token types
_UNKNOWN, _CONTROL, _USER, _UNUSED = 2, 3, 4, 5
_SPACE = "\u2581"
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
# llama.cpp's name -> how it splits texts, and whether it takes a word that is a token as a whole
_KNOWN: Mapping[str, tuple[Steps, bool]] = {
    name: (steps, whole) for steps, names in NAMES.items() for name, whole in names
} | {"default": ((GPT2,), False)}
_NORMALIZERS: Mapping[str, JsonObject] = {"qwen2": {"type": "NFC"}}
# kind of tokenizer -> pre-tokenizers with which llama.cpp adds BOS where the file does not state it; None: all
_BEGINS: Mapping[object, frozenset[str] | None] = {"gpt2": frozenset({"llama-bpe", "tekken"}), "llama": None}
_DAMAGED = "The file is damaged: download it again."


def tokenizer_files(source: GgufSource) -> tuple[dict[str, str], list[str]]:
    """({file name: text} of tokenizer.json and tokenizer_config.json, warnings). Raises Unsupported for a tokenizer
    that is not known to give the same tokens in transformers, InputError for a damaged one."""
    kind = source.metadata.get("tokenizer.ggml.model")
    if kind not in _MAKERS:
        raise Unsupported(
            f"{escape(source.path.name)}: moeconv cannot rebuild a tokenizer of the kind {escape(kind)}",
            hint=f"moeconv rebuilds {', '.join(_MAKERS)}. Use the original model.",
        )
    tokens, kinds = _list(source, "tokens", str), _list(source, "token_type", int)
    if len(tokens) != len(kinds) or len(tokens) != source.tensors["token_embd.weight"].shape[0]:
        raise InputError(
            f"{escape(source.path.name)} has {len(tokens)} tokens, {len(kinds)} types of tokens, and "
            f"{source.tensors['token_embd.weight'].shape[0]} embeddings",
            hint=_DAMAGED,
        )
    used = {i: word for i, word in enumerate(tokens) if kinds[i] != _UNUSED}
    if len(set(used.values())) != len(used):
        raise InputError(f"{escape(source.path.name)} has a token twice", hint=_DAMAGED)
    try:
        made = _MAKERS[str(kind)](source, used, kinds)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise InputError(f"{escape(source.path.name)}: the tokenizer: {escape(error)}", hint=_DAMAGED) from None
    special = (_UNKNOWN, _CONTROL, _USER)
    added = [
        {"id": i, "content": word, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": kinds[i] != _USER}
        for i, word in used.items() if kinds[i] in special
    ]  # fmt: skip
    about: JsonObject = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    words = _words(source, tokens)
    made |= {"post_processor": _around(source, words, tokens)}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **words}
    template = source.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    files = {"tokenizer.json": about | made, "tokenizer_config.json": config}
    return {name: json.dumps(value, ensure_ascii=False, indent=1) + "\n" for name, value in files.items()}, []


def _list(source: GgufSource, key: str, kind: type[_Kind]) -> list[_Kind]:
    value = source.metadata.get(f"tokenizer.ggml.{key}")
    found: list[_Kind] = [item for item in value if isinstance(item, kind)] if isinstance(value, list) else []
    if not isinstance(value, list) or len(found) < len(value):
        raise InputError(f"{escape(source.path.name)} has no tokenizer.ggml.{key}", hint=_DAMAGED)
    return found


def _words(source: GgufSource, tokens: Sequence[str]) -> JsonObject:
    """The special tokens by transformers' names."""
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    found: JsonObject = {}
    for key, name in names.items():
        stated = f"tokenizer.ggml.{key}_token_id"
        if stated in source.metadata:
            number = source.whole(stated, least=0)
            if number >= len(tokens):
                raise InputError(f"{stated} is {number}, but there are {len(tokens)} tokens", hint=_DAMAGED)
            found[name] = tokens[number]
    return found


def _around(source: GgufSource, words: JsonObject, tokens: Sequence[str]) -> JsonObject | None:
    """The template that adds BOS and EOS tokens, where the file asks for them or where llama.cpp adds them by
    default."""
    names = _BEGINS[source.metadata["tokenizer.ggml.model"]]
    begins = names is None or source.metadata.get("tokenizer.ggml.pre") in names
    first = _asked(source, "bos", begins, words)
    last = _asked(source, "eos", False, words)
    if not first and not last:
        return None
    one, two = ([*_part(first, at), {"Sequence": {"id": name, "type_id": at}}, *_part(last, at)]
                for at, name in enumerate("AB"))  # fmt: skip
    special = {word: {"id": word, "ids": [tokens.index(word)], "tokens": [word]} for word in (*first, *last)}
    return {"type": "TemplateProcessing", "single": one, "pair": [*one, *two], "special_tokens": special}


def _part(words: Sequence[str], at: int) -> list[JsonObject]:
    return [{"SpecialToken": {"id": word, "type_id": at}} for word in words]


def _asked(source: GgufSource, which: str, default: bool, words: JsonObject) -> list[str]:
    """The BOS or EOS token (`which`), where texts get it; nothing otherwise."""
    key = f"tokenizer.ggml.add_{which}_token"
    asked = source.metadata.get(key, default)
    if not isinstance(asked, bool):
        raise InputError(f"{key} is {escape(asked)}, but must be true or false", hint=_DAMAGED)
    if not asked:
        return []
    if f"{which}_token" not in words:
        raise Unsupported(
            f"texts get a {which} token, but the file does not state which it is", hint="Use the original model."
        )
    return [words[f"{which}_token"]]


def _step(kind: str) -> JsonObject:
    """One step of a pre_tokenizer of tokenizer.json."""
    if kind in (GPT2, BYTES):
        return _BYTE_LEVEL | {"use_regex": kind == GPT2}
    if kind == DIGITS:
        return {"type": "Digits", "individual_digits": True}
    return {"type": "Split", "pattern": {"Regex": kind}, "behavior": "Isolated", "invert": False}


def _bytes_bpe(source: GgufSource, used: Mapping[int, str], _kinds: Sequence[int]) -> JsonObject:
    """Byte-level BPE, split as the name of the pre-tokenizer says."""
    name = source.metadata.get("tokenizer.ggml.pre", "default")
    if name not in _KNOWN:
        raise Unsupported(
            f"the pre-tokenizer {escape(name)} is not known", hint=f"moeconv knows {', '.join(sorted(_KNOWN))}."
        )
    kinds, whole = _KNOWN[str(name)]
    *steps, last = map(_step, kinds)
    merges = [merge.split(" ", 1) for merge in _list(source, "merges", str)]
    if any(len(merge) != 2 for merge in merges):
        raise ValueError("a merge is not two tokens")
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": whole,
        "vocab": {word: i for i, word in used.items()}, "merges": merges,
    }  # fmt: skip
    return {
        "normalizer": _NORMALIZERS.get(str(name)),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, last]} if steps else last,
        "decoder": _BYTE_LEVEL | {"use_regex": True},
        "model": model,
    }


def _sentencepiece(source: GgufSource, used: Mapping[int, str], kinds: Sequence[int]) -> JsonObject:
    """SentencePiece's BPE: it joins the two neighbours whose joined token has the highest score, as merges in the order
    of the scores do."""
    scores = _list(source, "scores", float)
    numbers = {word: i for i, word in used.items()}
    ordinary = [word for word, i in numbers.items() if kinds[i] == 1 and len(word) > 1]
    found = [
        (-scores[numbers[word]], numbers[word[:at]], numbers[word[at:]], [word[:at], word[at:]])
        for word in ordinary for at in range(1, len(word)) if word[:at] in numbers and word[at:] in numbers
    ]  # fmt: skip
    unknown = next((word for word, i in numbers.items() if kinds[i] == _UNKNOWN), None)
    prefix = source.metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    front = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    decoders = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []),
    ]  # fmt: skip
    model = {
        "type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
        "vocab": numbers, "merges": [pair for _, _, _, pair in sorted(found)],
    }  # fmt: skip
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*front, spaces]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }


_MAKERS = {"gpt2": _bytes_bpe, "llama": _sentencepiece}
