"""Items assigned to groups of given sizes: assignment at least cost, and balanced k-means as a starting point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from moeconv.randomness import generator


def assign(cost: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """The group of every item, int64 [n], at least total cost; group g takes exactly sizes[g] items. `cost` is [n, G].

    Every item starts in its cheapest group. While a group has too many items, one item moves along every edge of the
    cheapest path from such a group to one with room (successive shortest paths, as for the transportation problem; the
    nodes are the groups alone). Raises ValueError when the sizes do not sum to n, and for costs that are not finite.
    """
    cost, room = np.asarray(cost, np.float64), np.asarray(sizes)
    if room.sum() != len(cost) or len(room) != cost.shape[1]:
        raise ValueError(f"{len(cost)} items cannot fill groups of {list(sizes)}")
    if not np.isfinite(cost).all():
        raise ValueError("the costs of an assignment must be finite")
    group: np.ndarray = cost.argmin(1)
    count = len(room)
    # to move the cheapest item of group a to group b: what it costs, and which item that is
    price, item = np.full((count, count), np.inf), np.zeros((count, count), np.int64)
    filled = np.bincount(group, minlength=count)
    stale: Sequence[int] = range(count)
    least = 1e-13 * float(np.abs(cost).max(initial=0.0))  # what rounding alone may gain
    while (full := filled > room).any():
        for a in stale:
            members = np.flatnonzero(group == a)
            if not len(members):
                price[a] = np.inf
                continue
            change = cost[members] - cost[members, a][:, None]
            first = change.argmin(0)
            price[a], item[a] = change[first, np.arange(count)], members[first]
        path = _cheapest_path(price, full, filled < room, least)
        moves = [(item[a, b], b) for a, b in pairwise(path)]
        for moved, b in moves:
            group[moved] = b
        filled[path[0]] -= 1
        filled[path[-1]] += 1
        stale = path
    return group


def _cheapest_path(price: np.ndarray, full: np.ndarray, free: np.ndarray, least: float) -> list[int]:
    """The groups on the cheapest path from one of `full` to one of `free`, bool [G], along edges that cost `price`
    [G, G] (Bellman-Ford: prices may be negative, but no circle of them is)."""
    distance, before = np.where(full, 0.0, np.inf), np.full(len(full), -1)
    for _ in range(len(full)):
        through = distance[:, None] + price
        found = through.argmin(0)
        value = through[found, np.arange(len(full))]
        nearer = value < distance - least
        if not nearer.any():
            break
        distance[nearer], before[nearer] = value[nearer], found[nearer]
    path = [int(np.where(free, distance, np.inf).argmin())]
    while before[path[-1]] >= 0:
        path.append(int(before[path[-1]]))
    return path[::-1]


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
        new = assign(cost, sizes)
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
