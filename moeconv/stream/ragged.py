"""Sequences of different lengths as one row of tokens: sorted by length, cut into batches, and padded on the right.

The padding follows the last token that is read, and attention is causal, so no mask is needed and no result changes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Ragged:
    """`ids` int64 [tokens], with the padding of every batch. `batches` are slices of the sequences in order of length;
    `starts` and `lengths` are the first token and the padded length of each; `places` int64 [n] is the first token of
    the given sequence i. `padding` counts the tokens that were added."""

    ids: np.ndarray
    batches: tuple[slice, ...]
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    places: np.ndarray
    padding: int
    _numbers: dict[int, int] = field(repr=False)  # first sequence of a batch -> its number

    @property
    def size(self) -> int:
        return int(self.ids.size)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def batch(self, values: Tensor, rows: slice) -> Tensor:
        """The part [b, S, ...] of `values` [tokens, ...] that belongs to the batch `rows`; it shares their memory."""
        number = self._numbers[rows.start]
        start, length = self.starts[number], self.lengths[number]
        count = rows.stop - rows.start
        return values[start : start + count * length].view(count, length, *values.shape[1:])


def pack(sequences: Sequence[Sequence[int]], *, batch_size: int, table: Callable[[int], Hashable]) -> Ragged:
    """Sequences of at least one token each as batches. A batch has at most as many tokens as `batch_size` sequences of
    the longest length, so that it takes no more memory than they do. Lengths for which `table` returns different values
    are in different batches: padding to the other length would change the rotary frequencies."""
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    room = batch_size * len(sequences[order[0]])
    batches, starts, lengths = list[slice](), list[int](), list[int]()
    places = np.zeros(len(sequences), np.int64)
    first = total = 0
    while first < len(order):
        length = len(sequences[order[first]])
        last = min(first + room // length, len(order))
        of_first = table(length)
        last = next((i for i in range(first + 1, last) if table(len(sequences[order[i]])) != of_first), last)
        batches.append(slice(first, last))
        starts.append(total)
        lengths.append(length)
        for i in order[first:last]:
            places[i] = total
            total += length
        first = last
    ids = np.zeros(total, np.int64)
    for place, sequence in zip(places, sequences, strict=True):
        ids[place : place + len(sequence)] = sequence
    numbers = {rows.start: number for number, rows in enumerate(batches)}
    padding = total - sum(map(len, sequences))
    return Ragged(ids, tuple(batches), tuple(starts), tuple(lengths), places, padding, numbers)
