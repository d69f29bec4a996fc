"""Neurons into groups of exactly given sizes: balanced assignment, and balanced k-means to start from.

scipy solves the assignment; nothing here knows what the costs mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moeconv.randomness import generator

_BLOCK = 2048  # items that one assignment problem takes: its cost grows with their square, its time with their cube


def assign(cost: np.ndarray, sizes: Sequence[int], *, key: Sequence[object] = ("assign",)) -> np.ndarray:
    """The group of every item, int64 [n], at least total cost; group g takes exactly sizes[g] items.

    cost: [n, G]. Optimal up to 2048 items (linear_sum_assignment); more are dealt into blocks of that size, each of
    which is optimal with its share of every group. Raises ValueError when the sizes do not sum to n.
    """
    from scipy.optimize import linear_sum_assignment

    n = len(cost)
    if sum(sizes) != n or len(sizes) != cost.shape[1]:
        raise ValueError(f"{n} items into groups of {list(sizes)}")
    blocks = -(-n // _BLOCK)
    order = np.arange(n) if blocks == 1 else generator(key).permutation(n)
    group: np.ndarray = np.empty(n, np.int64)
    done = 0
    for block in range(blocks):
        share = [size * (block + 1) // blocks - size * block // blocks for size in sizes]
        items = order[done : done + sum(share)]
        slots: np.ndarray = np.repeat(np.arange(len(sizes)), share)
        rows, columns = linear_sum_assignment(cost[np.ix_(items, slots)])
        group[items[rows]] = slots[columns]
        done += len(items)
    return group


def balanced_kmeans(points: np.ndarray, groups: int, *, key: Sequence[object], steps: int = 10) -> np.ndarray:
    """Balanced k-means of the rows of `points` [n, d] (k-means++ start): the group of each, int64 [n].

    Groups are equal; where n does not divide, the first ones take one more.
    """
    points = np.asarray(points, np.float32)
    n = len(points)
    sizes = [n // groups + (g < n % groups) for g in range(groups)]
    draw = generator((*key, "kmeans"))
    centres = _spread(points, groups, draw)
    group = None
    for _ in range(steps):
        cost = np.square(points).sum(1)[:, None] - 2 * points @ centres.T + np.square(centres).sum(1)
        new = assign(cost, sizes, key=(*key, "assign"))
        if group is not None and np.array_equal(new, group):
            break
        group = new
        centres = np.stack([points[group == g].mean(0) for g in range(groups)])
    assert group is not None
    return group


def _spread(points: np.ndarray, groups: int, draw: np.random.Generator) -> np.ndarray:
    """k-means++: each next centre is drawn with probability by its squared distance to the nearest one."""
    chosen = [points[draw.integers(len(points))]]
    nearest = np.square(points - chosen[0]).sum(1, dtype=np.float64)
    for _ in range(groups - 1):
        total = nearest.sum()
        at = draw.choice(len(points), p=nearest / total) if total > 0 else int(draw.integers(len(points)))
        chosen.append(points[at])
        nearest = np.minimum(nearest, np.square(points - chosen[-1]).sum(1, dtype=np.float64))
    return np.stack(chosen)
