"""Turns texts into windows of tokens: they are tokenized, cut into full windows, and sampled if there are too many.

The texts of one source (the records of a .jsonl file, the files of a directory) are joined by the end-of-text token.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import numpy as np

from moeconv.data.records import Text
from moeconv.data.texts import TextSource, read_sources
from moeconv.data.tokenizer import Tokenizer, load_tokenizer
from moeconv.errors import InputError, UsageError, escape
from moeconv.families.model import Model
from moeconv.plan.phases import phase
from moeconv.randomness import generator
from moeconv.units import counted

_BATCH = 256  # texts tokenized in one call
_BYTES_PER_TOKEN = 4


class SourceRecord(TypedDict):
    """A source as it is written into the provenance of an artifact."""

    name: str
    sha256: str
    tokens: int
    weight: float


@dataclass(frozen=True)
class Source:
    """A source of windows: its base name, the sha256 of its bytes, how many of its tokens are used, and its weight."""

    name: str
    sha256: str
    tokens: int
    weight: float = 1.0

    def to_json(self) -> SourceRecord:
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
    """(the windows to measure on, the held-out windows): the last of every `every` windows is held out. Raises
    InputError if there are fewer windows than `every`."""
    if len(read.windows) < every:
        raise InputError(
            f"the data fills {counted(len(read.windows), 'sequence')}, and at least {every} are needed, of which one "
            "is held out",
            hint="Give more text, more --tokens, or a smaller --seq-len.",
        )
    held_out = np.arange(len(read.windows)) % every == every - 1
    return _part(read, ~held_out), _part(read, held_out)


def _part(read: TokenData, chosen: np.ndarray) -> TokenData:
    counts = np.bincount(read.source[chosen], minlength=len(read.sources)) * read.seq_len
    sources = tuple(replace(s, tokens=int(n)) for s, n in zip(read.sources, counts))
    return TokenData(read.windows[chosen], read.source[chosen], sources)


@phase("read data")
def load_tokens(
    paths: Sequence[str],
    tokenizer_dir: str | os.PathLike[str],
    *,
    tokens: int | None,
    seq_len: int,
    seed: int,
    text_field: str = "text",
) -> TokenData:
    """The windows of the --data values `paths`: all of them, or a sample of `tokens` tokens (rounded down to windows).

    A sample takes windows from the sources in proportion to their weights (`FILE=WEIGHT`, otherwise 1), without
    replacement. What a short source lacks is taken from the others. The end of a source that does not fill a window is
    left out. A source that fills no window is refused and not padded, because padding would enter the statistics.

    Raises UsageError for sizes or values that cannot be used, InputError for data or a tokenizer that cannot be used.
    """
    if seq_len < 2:
        raise UsageError(f"--seq-len {seq_len}: a sequence needs at least 2 tokens", hint="Pass a larger --seq-len.")
    if tokens is not None and tokens < seq_len:
        raise UsageError(
            f"--tokens {tokens} is less than one sequence of {counted(seq_len, 'token')}",
            hint=f"Pass at least --tokens {seq_len}, or a smaller --seq-len.",
        )
    # of a data set on the hub, read eight times the bytes of the sample, so that it is drawn from more than it needs
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
    """Divide `total` into whole shares in proportion to `weights`, by largest remainders. No share is larger than what
    is `available` to it."""
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


def _windows(tokenizer: Tokenizer, source: TextSource, seq_len: int) -> np.ndarray:
    """The full windows int64 [n, seq_len] of one source. Raises InputError if there is none."""
    ids = _tokenize(tokenizer, source)
    count = len(ids) // seq_len
    if count == 0:
        raise InputError(
            f"{escape(source.name)} has {counted(len(ids), 'token')}, less than one sequence of {seq_len}",
            hint=f"Pass --seq-len {len(ids)} or less, or give more text." if len(ids) > 1 else "Give more text.",
        )
    return ids[: count * seq_len].reshape(count, seq_len)


def _tokenize(tokenizer: Tokenizer, source: TextSource) -> np.ndarray:
    """All tokens of one source, int64 [n], with the special tokens that the tokenizer adds to a text (such as <s>)."""
    end = tokenizer.eos_token_id
    pieces: list[np.ndarray] = []
    for start in range(0, len(source.texts), _BATCH):
        for ids in _encode(tokenizer, source, source.texts[start : start + _BATCH]):
            piece = np.asarray(ids, np.int64)
            if pieces and end is not None and (len(pieces[-1]) == 0 or pieces[-1][-1] != end):
                pieces.append(np.array([end], np.int64))
            pieces.append(piece)
    return np.concatenate(pieces)


def _encode(tokenizer: Tokenizer, source: TextSource, texts: Sequence[Text]) -> list[list[int]]:
    if all(isinstance(text, str) for text in texts):
        return tokenizer(list(texts), verbose=False)["input_ids"]
    if tokenizer.chat_template is None:
        raise InputError(
            f"{escape(source.name)} contains chats, and the tokenizer has no chat template",
            hint="Use a model whose tokenizer has a chat template, or plain text (--text-field).",
        )
    result = []
    for text in texts:
        if isinstance(text, str):
            result.append(tokenizer(text, verbose=False)["input_ids"])
            continue
        try:
            result.append(tokenizer.apply_chat_template(text.messages, tokenize=True, return_dict=False))
        except Exception as error:  # errors of jinja and of the template: the record does not fit the template
            raise InputError(
                f"{text.where}: the chat template does not accept the record: {escape(error)}",
                hint="Check the roles and order of its messages.",
            ) from error
    return result


def sequence_length(model: Model, asked: int | None, *, default: int) -> int:
    """The length of sequences: `asked`, or `default` if it is None, at most the positions of the model. Raises
    UsageError if `asked` is more than these."""
    most = model.value("max_position_embeddings")
    if asked is not None and most and asked > most:
        raise UsageError(f"--seq-len {asked} is more than the model's {most} positions", hint=f"Pass at most {most}.")
    return asked if asked is not None else min(default, most or default)
