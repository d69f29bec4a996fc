"""Questions as tokens: the inputs that a model runs on, each once, and the positions whose predictions are read."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from moeconv.data.tasks import Task
from moeconv.data.tokenizer import Tokenizer
from moeconv.errors import InputError
from moeconv.stream.ragged import Ragged, pack

_BATCH = 1024  # texts tokenized in one call


@dataclass(frozen=True, eq=False)
class Encoded:
    """All choices of all tasks, in order. Choice i owns the targets `bounds[i]` to `bounds[i + 1]`: the token
    `targets[t]` is predicted at `places[t]`, a position in `inputs.ids`. `truncated` counts the choices whose context
    was truncated at its beginning."""

    inputs: Ragged
    bounds: np.ndarray  # int64 [choices + 1]
    targets: np.ndarray  # int64 [tokens]
    places: np.ndarray  # int64 [tokens]
    truncated: int


def one_table(_length: int) -> Hashable:
    """The rotary frequencies of most models: the same for all lengths."""
    return 0


def encode(
    tasks: Sequence[Task], tokenizer: Tokenizer, *, longest: int, batch_size: int,
    table: Callable[[int], Hashable] = one_table,
) -> Encoded:  # fmt: skip
    """The tokens of all choices. As in lm-evaluation-harness, a context and its choice are tokenized together, spaces
    at the end of the context belong to the choice, and an input of more than `longest` tokens is truncated at its
    beginning. An input that is the beginning of another one, as with choices of one token that share their context, is
    not run by itself. Inputs are padded, or run as part of others, only where `table` returns the same value for both
    lengths.

    Raises InputError for a choice that is longer than `longest` alone, and for one that adds no token.
    """
    where = [q.where for task in tasks for q in task.questions for _ in q.choices]
    pairs = [pair for task in tasks for q in task.questions for pair in zip(q.contexts, q.choices, strict=True)]
    split = [context.rstrip() for context, _ in pairs]
    front = _front(tokenizer)
    whole = _tokens(tokenizer, [context + choice for context, choice in pairs])
    heads = dict(zip(distinct := list(dict.fromkeys(split)), _tokens(tokenizer, distinct), strict=True))
    inputs: list[list[int]] = []
    targets: list[list[int]] = []
    truncated = 0
    for place, context, ids in zip(where, split, whole, strict=True):
        start = front or ([] if heads[context] else _start(tokenizer, place))
        wanted = ids[len(heads[context]) :]
        if not wanted or len(wanted) > longest:
            problem = "adds no token to its context" if not wanted else f"has more than {longest} tokens"
            raise InputError(f"{place}: a choice {problem}", hint="Leave the question out.")
        tokens = [*start, *ids]
        truncated += len(tokens) > longest + 1
        inputs.append(tokens[-(longest + 1) : -1])
        targets.append(wanted)
    packed, firsts = _packed(inputs, batch_size, table)
    counts = [len(wanted) for wanted in targets]
    ends = [int(first) + len(ids) for first, ids in zip(firsts, inputs, strict=True)]
    places = np.concatenate([np.arange(end - count, end) for end, count in zip(ends, counts, strict=True)])
    bounds = np.concatenate([[0], np.cumsum(counts)])
    return Encoded(packed, bounds, np.concatenate(targets).astype(np.int64), places, truncated)


def _packed(
    inputs: Sequence[list[int]], batch_size: int, table: Callable[[int], Hashable]
) -> tuple[Ragged, np.ndarray]:  # fmt: skip
    """(the inputs that are run, the first position of every input in them)."""
    order = sorted(range(len(inputs)), key=inputs.__getitem__)
    run: list[list[int]] = []
    serves = np.zeros(len(inputs), np.int64)
    for i in reversed(order):  # an input that is the beginning of others comes before one of them
        size = len(inputs[i])
        if not run or run[-1][:size] != inputs[i] or table(len(run[-1])) != table(size):
            run.append(inputs[i])
        serves[i] = len(run) - 1
    packed = pack(run, batch_size=batch_size, table=table)
    return packed, packed.places[serves]


def _tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    found: list[list[int]] = []
    for start in range(0, len(texts), _BATCH):
        batch = list(texts[start : start + _BATCH])
        found += tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def _front(tokenizer: Tokenizer) -> list[int]:
    """The tokens that the tokenizer puts before every text, such as <s>."""
    bare, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    starts = (i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return list(full[: next(starts, 0)])


def _start(tokenizer: Tokenizer, where: str) -> list[int]:
    """What an empty context is: the token that begins a text, or the one that ends it."""
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if token is None:
        raise InputError(
            f"{where}: the context is empty, and the tokenizer has no BOS or EOS token", hint="Give a context."
        )
    return [token]
