"""Texts -> windows of tokens: tokenized whole, cut into full windows, sampled with a seed where there are too many.

The texts of one source (records of a .jsonl, files of a directory) are joined with the end-of-text token between them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moeconv.data.records import Text
from moeconv.data.texts import TextSource, read_sources
from moeconv.data.tokenizer import load_tokenizer
from moeconv.errors import InputError, UsageError, escape
from moeconv.families.model import Model
from moeconv.randomness import generator

_BATCH = 256  # texts tokenized in one call
_BYTES_PER_TOKEN = 4


@dataclass(frozen=True)
class Source:
    """Where windows came from: a base name, the hash of its bytes, its weight, and the tokens of its that are used."""

    name: str
    sha256: str
    tokens: int
    weight: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """For the provenance of an artifact."""
        return {"name": self.name, "sha256": self.sha256, "tokens": self.tokens, "weight": self.weight}


@dataclass(frozen=True, eq=False)
class TokenData:
    """`windows` int64 [n, seq_len], `source` int64 [n] (an index into `sources`), in order of source and position."""

    windows: np.ndarray
    source: np.ndarray
    sources: tuple[Source, ...]

    @property
    def seq_len(self) -> int:
        return int(self.windows.shape[1])

    @property
    def tokens(self) -> int:
        return int(self.windows.size)


def split_windows(read: TokenData, *, every: int) -> tuple[TokenData, TokenData]:
    """(what is measured on, what judges): the last of every `every` windows judges. Raises InputError when there are
    fewer windows than that."""
    if len(read.windows) < every:
        raise InputError(
            f"the data fills {len(read.windows)} sequences, and one of every {every} must judge",
            hint="Give more text, more --tokens, or a smaller --seq-len.",
        )
    judges = np.arange(len(read.windows)) % every == every - 1
    return _part(read, ~judges), _part(read, judges)


def _part(read: TokenData, chosen: np.ndarray) -> TokenData:
    counts = np.bincount(read.source[chosen], minlength=len(read.sources)) * read.seq_len
    sources = tuple(replace(s, tokens=int(n)) for s, n in zip(read.sources, counts))
    return TokenData(read.windows[chosen], read.source[chosen], sources)


def load_tokens(
    paths: Sequence[str],
    tokenizer_dir: str | os.PathLike[str],
    *,
    tokens: int | None,
    seq_len: int,
    seed: int,
    text_field: str = "text",
) -> TokenData:
    """The windows of `--data` values `paths`: all of them, or a sample of `tokens` tokens (rounded down to windows).

    A sample takes from the sources in proportion to their weights (`FILE=WEIGHT`, else 1), without replacement; what a
    short source cannot give, the others do. The tail of a source that fills no window is left out, and a source that
    fills none is refused rather than padded: padding would enter the statistics.

    Raises UsageError for sizes or values that make no sense, InputError for data or a tokenizer that cannot be used.
    """
    if seq_len < 2:
        raise UsageError(f"--seq-len {seq_len}: at least 2 tokens make a sequence")
    if tokens is not None and tokens < seq_len:
        raise UsageError(
            f"--tokens {tokens} is less than one sequence of {seq_len} tokens",
            hint=f"Pass at least --tokens {seq_len}, or a smaller --seq-len.",
        )
    # of a hub data set, eight times the bytes that the sample fills with usual text: it draws from more than it needs
    wanted = None if tokens is None else tokens * _BYTES_PER_TOKEN * 8
    texts = read_sources(list(paths), text_field=text_field, hub_bytes=wanted)
    tokenizer = load_tokenizer(tokenizer_dir)
    cut = [_windows(tokenizer, source, seq_len) for source in texts]
    total = sum(map(len, cut)) if tokens is None else tokens // seq_len
    counts = share_out([len(w) for w in cut], [s.weight for s in texts], total)
    kept = []
    for i, (windows, count) in enumerate(zip(cut, counts)):
        if count < len(windows):
            windows = windows[np.sort(generator((seed, "windows", i)).permutation(len(windows))[:count])]
        kept.append(windows)
    return TokenData(
        np.concatenate(kept),
        np.repeat(np.arange(len(kept)), counts),
        tuple(Source(s.name, s.sha256, n * seq_len, s.weight) for s, n in zip(texts, counts)),
    )


def share_out(available: Sequence[int], weights: Sequence[float], total: int) -> list[int]:
    """Whole shares of `total` in proportion to `weights`, none above what is `available` (largest remainders)."""
    shares = [0] * len(available)
    remaining = min(total, sum(available))
    waiting = list(range(len(available)))
    while waiting:
        scale = remaining / sum(weights[i] for i in waiting)
        exhausted = [i for i in waiting if available[i] <= weights[i] * scale]
        for i in exhausted:
            shares[i] = available[i]
            remaining -= available[i]
        if not exhausted:
            break
        waiting = [i for i in waiting if i not in exhausted]
    if waiting:
        quota = {i: weights[i] * remaining / sum(weights[j] for j in waiting) for i in waiting}
        for i in waiting:
            shares[i] = int(quota[i])
        left = remaining - sum(shares[i] for i in waiting)
        for i in sorted(waiting, key=lambda i: (shares[i] - quota[i], i))[:left]:
            shares[i] += 1
    return shares


def _windows(tokenizer: Any, source: TextSource, seq_len: int) -> np.ndarray:
    """Full windows int64 [n, seq_len] of one source."""
    ids = _tokenize(tokenizer, source)
    count = len(ids) // seq_len
    if count == 0:
        raise InputError(
            f"{escape(source.name)} has {len(ids)} tokens, less than one sequence of {seq_len}",
            hint=f"Pass --seq-len {len(ids)} or less, or give more text." if len(ids) > 1 else "Give more text.",
        )
    return ids[: count * seq_len].reshape(count, seq_len)


def _tokenize(tokenizer: Any, source: TextSource) -> np.ndarray:
    """All tokens of one source, int64 [n]; the tokenizer adds what it adds to any text (such as a first <s>)."""
    end = tokenizer.eos_token_id
    pieces: list[np.ndarray] = []
    for start in range(0, len(source.texts), _BATCH):
        for ids in _encode(tokenizer, source, source.texts[start : start + _BATCH]):
            piece = np.asarray(ids, np.int64)
            if pieces and end is not None and (len(pieces[-1]) == 0 or pieces[-1][-1] != end):
                pieces.append(np.array([end], np.int64))
            pieces.append(piece)
    return np.concatenate(pieces)


def _encode(tokenizer: Any, source: TextSource, texts: Sequence[Text]) -> list[list[int]]:
    if all(isinstance(text, str) for text in texts):
        return tokenizer(list(texts), verbose=False)["input_ids"]
    if tokenizer.chat_template is None:
        raise InputError(
            f"{escape(source.name)} holds chats, and the tokenizer has no chat template",
            hint="Use the tokenizer of a chat model, or plain text (--text-field).",
        )
    result = []
    for text in texts:
        if isinstance(text, str):
            result.append(tokenizer(text, verbose=False)["input_ids"])
            continue
        try:
            result.append(tokenizer.apply_chat_template(text.messages, tokenize=True, return_dict=False))
        except Exception as error:  # jinja and template errors: the template and the record do not fit
            raise InputError(
                f"{text.where}: the chat template refuses the record: {escape(error)}",
                hint="Check the roles and order of its messages.",
            ) from error
    return result


def sequence_length(model: Model, asked: int | None, *, default: int) -> int:
    """`asked`, or `default` shortened to what the model was made for. Raises UsageError for more than that."""
    most = model.value("max_position_embeddings")
    if asked is not None and most and asked > most:
        raise UsageError(f"--seq-len {asked} is more than the model's {most} positions", hint=f"At most {most}.")
    return asked if asked is not None else min(default, most or default)
