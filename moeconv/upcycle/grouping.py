"""Items assigned to groups of given sizes: assignment at least cost, and balanced k-means as a starting point.

scipy solves the assignment problem.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from moeconv.matching import assignment
from moeconv.randomness import generator

_BLOCK = 2048  # items per assignment problem: its memory grows with their square, its time with their cube


def assign(cost: np.ndarray, sizes: Sequence[int], *, key: Sequence[object] = ("assign",)) -> np.ndarray:
    """The group of every item, int64 [n], at least total cost; group g takes exactly sizes[g] items.

    `cost` is [n, G]. The result is optimal for up to 2048 items (the Hungarian method). More items are divided at
    random into blocks of that size, and each block is assigned optimally to its share of every group. Raises ValueError
    when the sizes do not sum to n.
    """
    n = len(cost)
    if sum(sizes) != n or len(sizes) != cost.shape[1]:
        raise ValueError(f"{n} items cannot fill groups of {list(sizes)}")
    blocks = -(-n // _BLOCK)
    order = np.arange(n) if blocks == 1 else generator(key).permutation(n)
    group: np.ndarray = np.empty(n, np.int64)
    done = 0
    for block in range(blocks):
        share = [size * (block + 1) // blocks - size * block // blocks for size in sizes]
        items = order[done : done + sum(share)]
        slots: np.ndarray = np.repeat(np.arange(len(sizes)), share)
        rows, columns = assignment(-cost[np.ix_(items, slots)])
        group[items[rows]] = slots[columns]
        done += len(items)
    return group


def balanced_kmeans(points: np.ndarray, groups: int, *, key: Sequence[object], steps: int = 10) -> np.ndarray:
    """Balanced k-means of the rows of `points` [n, d] (k-means++ start): the group of each, int64 [n].

    The groups have equal sizes; where `groups` does not divide n, the first groups have one item more.
    """
    points = np.asarray(points, np.float32)
    n = len(points)
    sizes = [n // groups + (g < n % groups) for g in range(groups)]
    draw = generator((*key, "kmeans"))
    centres = points[
        seeds(len(points), groups, draw, lambda at: np.square(points - points[at]).sum(1, dtype=np.float64))
    ]
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


def seeds(
    count: int, groups: int, draw: np.random.Generator, distance: Callable[[int], np.ndarray], *, least: float = 0.0
) -> list[int]:
    """The initial centres of k-means++ (Arthur and Vassilvitskii 2007): `groups` of `count` items, each drawn in
    proportion to its squared distance from the nearest one that is drawn already.

    `distance(i)` is the squared distance [count] of every item from item i. Where the distances sum to no more than
    `least`, all items are alike, and the first item that is not drawn yet is taken.
    """
    chosen = [int(draw.integers(count))]
    nearest = distance(chosen[0])
    for _ in range(groups - 1):
        weight = np.maximum(nearest, 0).astype(np.float64)
        total = weight.sum()
        if total > least:
            pick = int(draw.choice(count, p=weight / total))
        else:
            pick = int(np.setdiff1d(np.arange(count), chosen)[0])
        chosen.append(pick)
        nearest = np.minimum(nearest, distance(pick))
    return chosen
