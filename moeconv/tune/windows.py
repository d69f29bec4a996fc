"""Divides the windows into those that train and those that are held out, and orders the training windows."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from moeconv.data.windows import TokenData, share_out
from moeconv.errors import InputError
from moeconv.randomness import generator
from moeconv.units import counted

HELD_OUT = 0.1


def split(data: TokenData, *, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(training windows, held-out windows), both int64 [n, S]. The end of every source is held out.

    A tenth of the windows and at least one batch is held out, but never more than half. Raises InputError for data of
    less than two windows.
    """
    total = len(data.windows)
    if total < 2:
        raise InputError(
            f"the data fills {counted(total, 'sequence')} of {counted(data.seq_len, 'token')}, and training "
            "needs at least two: one to train on, and one that is held out",
            hint="Give more text, or a smaller --seq-len.",
        )
    held = min(max(math.ceil(total * HELD_OUT), batch_size), total // 2)
    counts = np.bincount(data.source, minlength=len(data.sources))
    # the windows of a source are consecutive, in the order of their positions
    last: np.ndarray = np.zeros(total, bool)
    for end, share in zip(np.cumsum(counts), share_out(counts.tolist(), counts.tolist(), held)):
        last[end - share : end] = True
    return data.windows[~last], data.windows[last]


def batches(count: int, size: int, *, key: tuple[object, ...]) -> Iterator[np.ndarray]:
    """Yield batches of indices below `count` without end. `key` determines the order of each pass over the indices."""
    size = min(size, count)
    queue: np.ndarray = np.empty(0, np.int64)
    epoch = 0
    while True:
        while len(queue) < size:
            queue = np.concatenate([queue, generator((*key, epoch)).permutation(count)])
            epoch += 1
        yield queue[:size]
        queue = queue[size:]
