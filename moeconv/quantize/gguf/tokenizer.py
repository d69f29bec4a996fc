"""The tokenizer inside a GGUF file: tokens, types, merges or scores, and llama.cpp's name for how texts are split.

A file that tokenizes a text differently from transformers is a silently wrong model. Only tokenizers that llama.cpp is
known to follow exactly are written: byte-level BPE with known splits, and SentencePiece's BPE with byte fallback.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Protocol

from moeconv.checkpoint.strictjson import read_json_object
from moeconv.errors import InputError, escape
from moeconv.quantize.gguf.pre_tokenizers import NAMES, merged, steps_of
from moeconv.types import JsonObject

# ggml's token types
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "\u2581"  # what SentencePiece writes for a space


class TokenizerWriter(Protocol):
    """What is used here of `gguf.GGUFWriter`."""

    def add_tokenizer_model(self, model: str) -> None: ...

    def add_tokenizer_pre(self, pre: str) -> None: ...

    def add_token_scores(self, scores: Sequence[float]) -> None: ...

    def add_add_space_prefix(self, value: bool) -> None: ...

    def add_token_list(self, tokens: Sequence[str]) -> None: ...

    def add_token_types(self, types: Sequence[int]) -> None: ...


def add_tokenizer(gguf: ModuleType, writer: TokenizerWriter, folder: Path, *, size: int) -> list[str]:
    """Write the tokenizer of a checkpoint's directory, padded to the `size` rows of the model's embedding. Returns
    warnings.

    Raises InputError without a tokenizer.json, and for one that llama.cpp is not known to follow."""
    if not (folder / "tokenizer.json").is_file():
        raise InputError(
            "a GGUF file needs the tokenizer, and the checkpoint has no tokenizer.json",
            hint="Make one: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) in transformers.",
        )
    tokenizer = read_json_object(folder / "tokenizer.json", what="tokenizer.json")
    try:
        if tokenizer["model"].get("type") != "BPE":
            raise _unknown()
        rows = _rows(tokenizer, size)
        sentencepiece = bool(tokenizer["model"].get("byte_fallback"))
        notes = []
        if sentencepiece:
            writer.add_tokenizer_model("llama")
            writer.add_tokenizer_pre("default")
            writer.add_token_scores(_scores(tokenizer, [word for word, _ in rows]))
            writer.add_add_space_prefix(_space_in_front(tokenizer))
            if _space_in_front(tokenizer) and tokenizer.get("pre_tokenizer"):
                notes.append(
                    "llama.cpp puts a space in front of every text; this tokenizer does so only where a text does not "
                    "begin with a space, and never after a special token. Such texts begin with another token in "
                    "llama.cpp"
                )
        else:
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre(_pre_tokenizer(tokenizer))
        writer.add_token_list([word for word, _ in rows])
        writer.add_token_types([kind for _, kind in rows])
        vocabulary = gguf.SpecialVocab(folder, load_merges=not sentencepiece, n_vocab=size)
        # without a template that adds it, transformers adds no token in front; llama.cpp's default differs by model
        vocabulary.add_special_token = {"bos": False, "eos": False} | vocabulary.add_special_token
        vocabulary.add_to_gguf(writer, quiet=True)
        return notes
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(f"tokenizer.json is malformed: {escape(error)}", hint="Restore the file.") from None


def _rows(tokenizer: JsonObject, size: int) -> list[tuple[str, int]]:
    """(token, type) of every row of the embedding."""
    model = tokenizer["model"]
    kinds = dict.fromkeys(model["vocab"], _NORMAL)
    if model.get("byte_fallback"):
        kinds |= {f"<0x{byte:02X}>": _BYTE for byte in range(256)}
        kinds |= {model["unk_token"]: _UNKNOWN} if model.get("unk_token") else {}
    words = {i: (word, kinds[word]) for word, i in model["vocab"].items()}
    for token in tokenizer.get("added_tokens") or ():
        held = words.get(token["id"], ("", _NORMAL))[1]
        kind = _CONTROL if token["special"] else _USER
        words[token["id"]] = (token["content"], held if held == _UNKNOWN else kind)
    if any(type(i) is not int or not 0 <= i < size for i in words):
        raise InputError(
            f"tokenizer.json has a token beyond the {size} rows of the model's embedding",
            hint="The tokenizer and the weights do not belong together.",
        )
    return [words.get(i, (f"[PAD{i}]", _UNUSED)) for i in range(size)]


# -- byte-level BPE ----------------------------------------------------------------------------------------------------


def _pre_tokenizer(tokenizer: JsonObject) -> str:
    """llama.cpp's name for how the tokenizer splits texts. Raises InputError where it has none."""
    steps = steps_of(tokenizer.get("pre_tokenizer") or {})
    normalizer = (tokenizer.get("normalizer") or {}).get("type")
    names = NAMES.get(steps or ())
    if names is None or normalizer not in (None, "NFC"):
        raise _unknown()
    model = tokenizer["model"]
    wanted = bool(model.get("ignore_merges"))
    exact = [name for name, whole in names if whole == wanted]
    # a family's own name is that of the first
    if exact and exact[0] == names[0][0]:
        return exact[0]
    if _merges_make_all(model, tokenizer):
        return names[1 if len(names) > 1 and not wanted else 0][0]
    if not exact:
        raise _unknown()
    return exact[0]


def _merges_make_all(model: JsonObject, tokenizer: JsonObject) -> bool:
    """Whether the merges make every token of the vocabulary from its bytes, so that it does not matter whether a word
    that is a token is merged at all."""
    ranks = {_pair(merge): rank for rank, merge in enumerate(model["merges"])}
    special = {token["content"] for token in tokenizer.get("added_tokens") or ()}
    return all(len(word) == 1 or word in special or merged(word, ranks) == [word] for word in model["vocab"])


def _unknown() -> InputError:
    known = sorted({name for names in NAMES.values() for name, _ in names})
    return InputError(
        "llama.cpp is not known to split texts as this tokenizer does",
        hint="GGUF is written for SentencePiece's BPE with byte fallback, and for byte-level BPEs that split as "
        f"{', '.join(known)} do.",
    )


# -- SentencePiece -----------------------------------------------------------------------------------------------------


def _space_in_front(tokenizer: JsonObject) -> bool:
    """Whether a space is put in front of a text. Raises InputError for a tokenizer that changes more than spaces."""
    normalizer, pre = tokenizer.get("normalizer") or {}, tokenizer.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if pre.get("type") == "Split" and pre.get("pattern") == {"String": " "} and steps[-1:] == [replaced]:
        pre = {}  # Gemma's: no space is left to split at
    if not pre and steps and steps[-1] == replaced:
        if len(steps) == 1:
            return False
        if steps[:-1] == [{"type": "Prepend", "prepend": _SPACE}]:
            return True
    if not steps and pre.get("type") == "Metaspace" and pre.get("replacement") == _SPACE and not pre.get("split", True):
        return bool(pre.get("prepend_scheme", "always") != "never")
    raise _unknown()


def _scores(tokenizer: JsonObject, words: Sequence[str]) -> list[float]:
    """The score of every token: llama.cpp joins the two neighbours whose joined token has the highest score.

    A tokenizer.json lists merges in the order of those scores. Raises InputError where joining by the token alone, in
    that order, would not do what the merges do."""
    model = tokenizer["model"]
    if model.get("ignore_merges") or model.get("dropout"):
        raise _unknown()
    merges = [_pair(merge) for merge in model["merges"]]
    rank = _ranks(merges)
    special = {token["content"] for token in tokenizer.get("added_tokens") or ()}
    _check_joins(model["vocab"], set(merges), rank, special)
    return [-float(rank[word]) if word in rank else 0.0 for word in words]


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    """The two tokens of a merge. Raises ValueError where they are not two."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _ranks(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """The position of the first merge that makes each token. Raises InputError where a token's merges are not next to
    each other: no one score stands for both positions."""
    rank: dict[str, int] = {}
    before = ""
    for at, (left, right) in enumerate(merges):
        made = left + right
        if made in rank and made != before:
            raise _unknown()
        rank.setdefault(made, at)
        before = made
    return rank


def _check_joins(
    vocabulary: Mapping[str, int], merges: set[tuple[str, str]], rank: Mapping[str, int], special: set[str]
) -> None:
    """Raises InputError where two tokens could be joined that no merge joins."""
    if any(pair not in merges for word in rank for pair in _halves(word, vocabulary)):
        raise _unknown()
    # A token that no merge makes must never be made by joining: it is one character, or matched whole as special.
    unmade = (word for word in vocabulary if word not in rank and word not in special and len(word) > 1)
    if any(True for word in unmade for _ in _halves(word, vocabulary)):
        raise _unknown()


def _halves(word: str, vocabulary: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """The pairs of tokens that make a token when they are joined."""
    for at in range(1, len(word)):
        if word[:at] in vocabulary and word[at:] in vocabulary:
            yield word[:at], word[at:]
