"""How byte-level tokenizers split texts into words before they merge bytes, and llama.cpp's names for it, as data.

The steps are those of the pre_tokenizer in tokenizer.json: a regular expression (Split, Isolated), DIGITS (Digits, one
by one), GPT2 (ByteLevel with its own expression), and BYTES (ByteLevel without one).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from moeconv.types import JsonObject

DIGITS, GPT2, BYTES = "digits", "gpt2", "bytes"
Steps = tuple[str, ...]

_WORDS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SLASH_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
LLAMA3 = _WORDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
QWEN2 = _WORDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_QWEN35 = _WORDS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*|\p{{N}}" + _SLASH_TAIL
_GPT4O = rf"{_START}{_UPPER}*{_LOWER}+{_WORDS}?|{_START}{_UPPER}+{_LOWER}*{_WORDS}?|\p{{N}}{{1,3}}" + _SLASH_TAIL
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_SEED = (
    _WORDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}" + "\r\n" + r"]+|\s*[" + "\r\n" + r"]+|\s+(?!\S)|\s+"
)
_JAIS2 = (
    _WORDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    + "".join(rf"|\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4)) + r"|\s{1,2}(?!\S)|\s{1}"
)  # fmt: skip
_EXAONE_MOE = (
    _WORDS + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]"
    r"|\s+(?!\S)|\s+"
)  # fmt: skip
_NUMBERS = r"\p{N}{1,3}"
_HAN = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^""" + "\r\n" + r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[" + "\r\n" + r"]*|\s*[" + "\r\n" + r"]+|\s+(?!\S)|\s+"
)  # fmt: skip

# steps -> (llama.cpp's name, whether it takes a word that is a token as a whole without merging)
NAMES: Mapping[Steps, tuple[tuple[str, bool], ...]] = {
    (GPT2,): (("gpt-2", False),),
    (DIGITS, GPT2): (("smollm", False),),
    (LLAMA3, BYTES): (("llama-bpe", True), ("glm4", True), ("smaug-bpe", False)),
    (QWEN2, BYTES): (("qwen2", False),),
    (_QWEN35, BYTES): (("qwen35", False),),
    (_TEKKEN, BYTES): (("tekken", True),),
    (_GPT4O, BYTES): (("gpt-4o", False),),
    (_BAILING, BYTES): (("bailingmoe", False),),
    (_SEED, BYTES): (("seed-coder", False),),
    (_JAIS2, BYTES): (("jais-2", False),),
    (_EXAONE_MOE, BYTES): (("exaone-moe", False),),
    (_NUMBERS, _HAN, _DEEPSEEK3, BYTES): (("deepseek-v3", False),),
}


def steps_of(pre: JsonObject) -> Steps | None:
    """The steps of a pre_tokenizer of tokenizer.json; None where one of them is of another kind."""
    found: list[str] = []
    for step in pre.get("pretokenizers", [pre]):
        kind = step.get("type")
        if kind == "ByteLevel" and not step.get("add_prefix_space"):
            found.append(GPT2 if step.get("use_regex", True) else BYTES)
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            found.append((step.get("pattern") or {}).get("Regex") or "")
        elif kind == "Digits" and step.get("individual_digits"):
            found.append(DIGITS)
        else:
            return None
    return tuple(found)


def merged(word: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """The tokens that a word becomes by merging the pair of the lowest rank first."""
    parts = list(word)
    while len(parts) > 1:
        rank, at = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairwise(parts)))
        if rank == len(ranks):
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts
