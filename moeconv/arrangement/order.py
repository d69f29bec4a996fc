"""An order of the experts of a layer whose equal contiguous shares have equal load.

First the experts are assigned in the order of decreasing load, each to the share with the least load that is not full.
Swaps of two experts then even out the loads, and further swaps bring experts that process a token together into one
share, as long as no share gets more than `_SLACK` above the mean, or above what the first swaps reached. The assignment
is repeated for a few random orders, and the result with the least traffic is taken. All costs of swaps are computed at
once, as [E, E].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeconv.errors import UsageError
from moeconv.randomness import generator
from moeconv.units import counted

_SLACK = 0.03  # of the mean load: how much evenness is traded for less traffic
_STARTS, _WORK = 16, 1 << 16  # initial orders: at most, and their number times the square of the number of experts


@dataclass(frozen=True)
class ShareLoad:
    """How evenly `shares` equal contiguous shares of the experts are loaded (largest load over mean load; None without
    any), and the fraction of expert pairs processing a token together that are in different shares (None if there are
    no pairs)."""

    max_over_mean: float | None
    crossing: float | None


def check_shares(experts: int, shares: int, groups: int) -> None:
    """Raises UsageError if the experts, in the `groups` that the router chooses among, do not divide into `shares`."""
    if not 2 <= shares <= experts or experts % shares:
        raise UsageError(
            f"--devices {shares}: {counted(experts, 'expert')} cannot be divided into so many equal shares",
            hint="Pass a number of 2 or more that divides the number of experts.",
        )
    if groups > 1 and groups % shares and shares % groups:
        raise UsageError(
            f"--devices {shares}: the router chooses among {groups} groups of consecutive experts, and a share would "
            "hold parts of several groups",
            hint=f"Pass a number that divides {groups}, or a multiple of it.",
        )


def share_load(load: np.ndarray, together: np.ndarray, order: np.ndarray, shares: int) -> ShareLoad:
    """The evenness and the traffic of an order. `load` [E] are the tokens of each expert, `together` [E, E] those of
    each pair, `order` [E] the experts in their new order."""
    of = np.repeat(np.arange(shares), len(order) // shares)
    sums = load[order].reshape(shares, -1).sum(1)
    pairs = together[np.ix_(order, order)] * (1 - np.eye(len(order)))
    whole, across = float(pairs.sum()), float(pairs[of[:, None] != of[None]].sum())
    mean = float(sums.mean())
    return ShareLoad(float(sums.max()) / mean if mean > 0 else None, across / whole if whole > 0 else None)


def even_order(load: np.ndarray, together: np.ndarray, shares: int, *, groups: int = 1) -> np.ndarray:
    """The experts in their new order, int64 [E]. A router with `groups` keeps their experts together: whole groups
    move, or the experts move inside each group."""
    experts = len(load)
    size = experts // groups
    numbers = np.arange(experts).reshape(groups, size)
    if groups == 1:
        return numbers[0][_dealt(load, together, shares)]
    if groups % shares == 0:
        blocks = together.reshape(groups, size, groups, size).sum((1, 3))
        return numbers[_dealt(load.reshape(groups, size).sum(1), blocks, shares)].reshape(-1)
    each = shares // groups
    return np.concatenate([of[_dealt(load[of], together[np.ix_(of, of)], each)] for of in numbers])


def _dealt(load: np.ndarray, together: np.ndarray, shares: int) -> np.ndarray:
    """The order of items with these loads, in shares of equal size."""
    count = len(load)
    if shares == 1:
        return np.arange(count)
    pairs = together * (1.0 - np.eye(count))
    found = []
    for start in range(max(1, min(_STARTS, _WORK // count**2))):
        first = generator(("arrange", start)).permutation(count) if start else np.argsort(-load, kind="stable")
        found.append(_evenly(load, shares, first))
    limit = max(min(float(sums.max()) for _, sums in found), (1 + _SLACK) * float(found[0][1].mean()))
    together_in = [
        _gathered(load, pairs, share, sums, limit) for share, sums in found if sums.max() <= limit * (1 + 1e-9)
    ]
    return np.argsort(max(together_in, key=lambda one: one[0])[1], kind="stable")


def _gathered(
    load: np.ndarray, pairs: np.ndarray, share: np.ndarray, sums: np.ndarray, limit: float
) -> tuple[float, np.ndarray]:
    """(the pairs inside shares, the share of each item) after swaps that bring items of the same tokens together, as
    long as no load exceeds `limit`."""
    count, shares = len(load), len(sums)
    for _ in range(4 * count):
        to_share = np.stack([pairs[:, share == s].sum(1) for s in range(shares)], 1)  # [E, shares]
        own = to_share[np.arange(count), share]
        gain = to_share[:, share] - own[:, None]  # of moving a to the share of b
        gain = gain + gain.T - 2 * pairs
        moved = load[:, None] - load[None]
        fits = (sums[share][:, None] - moved <= limit) & (sums[share][None] + moved <= limit)
        gain = np.where(fits & (share[:, None] != share[None]), gain, -np.inf)
        a, b = np.unravel_index(int(np.argmax(gain)), gain.shape)
        if not gain[a, b] > 1e-9 * max(1.0, float(pairs.sum())):
            break
        _swap(load, share, sums, int(a), int(b))
    return float(pairs[share[:, None] == share[None]].sum()), share


def _evenly(load: np.ndarray, shares: int, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the share of each item, the load of each share): assigned in the order `first`, then evened out by swaps."""
    count = len(load)
    share, sums, held = np.zeros(count, np.int64), np.zeros(shares), np.zeros(shares, np.int64)
    for one in first:
        at = int(np.argmin(np.where(held < count // shares, sums, np.inf)))
        share[one], sums[at], held[at] = at, sums[at] + load[one], held[at] + 1
    for _ in range(4 * count):
        change = _evened(load, share, sums)
        a, b = np.unravel_index(int(np.argmin(change)), change.shape)
        if not change[a, b] < -1e-9 * max(1.0, float(sums.mean()) ** 2):
            break
        _swap(load, share, sums, int(a), int(b))
    return share, sums


def _evened(load: np.ndarray, share: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """[E, E]: by how much the sum of squared loads of the shares changes if two are swapped."""
    moved = load[:, None] - load[None]
    change = 2 * moved**2 - 2 * moved * (sums[share][:, None] - sums[share][None])
    return np.where(share[:, None] != share[None], change, np.inf)


def _swap(load: np.ndarray, share: np.ndarray, sums: np.ndarray, a: int, b: int) -> None:
    sums[share[a]] += load[b] - load[a]
    sums[share[b]] += load[a] - load[b]
    share[a], share[b] = share[b], share[a]
