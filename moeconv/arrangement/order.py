"""An order of the experts of a layer whose equal contiguous shares have equal load.

First the experts are assigned in the order of decreasing load, each to the share with the least load that is not full.
Swaps of two experts then even out the loads, and further swaps bring experts that process a token together into one
share, as long as the unevenness grows by little (`_SLACK`). The assignment is repeated for a few random orders, and of
the even results the one with the least traffic is taken. All costs of swaps are computed at once, as [E, E].

The unevenness is the sum of squared differences from the mean, in units of it: of the loads over all text and, with a
smaller weight, of those on each data source. Other text has another mixture of sources and topics, so that shares which
are even on each of them stay more even.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeconv.errors import UsageError
from moeconv.randomness import generator
from moeconv.units import counted

_SLACK = 0.03  # root mean square over the shares, in mean loads: how much evenness is traded for less traffic
_BY_SOURCE = 0.25  # weight of the unevenness on the single data sources, together
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
    """The experts in their new order, int64 [E]. `load` [sources, E] are the tokens of each expert by data source (or
    [E]), `together` [E, E] those of each pair. A router with `groups` keeps their experts together: whole groups move,
    or the experts move inside each group."""
    load = np.atleast_2d(load)
    experts = load.shape[1]
    size = experts // groups
    numbers = np.arange(experts).reshape(groups, size)
    if groups == 1:
        return numbers[0][_dealt(load, together, shares)]
    if groups % shares == 0:
        blocks = together.reshape(groups, size, groups, size).sum((1, 3))
        return numbers[_dealt(load.reshape(-1, groups, size).sum(2), blocks, shares)].reshape(-1)
    each = shares // groups
    return np.concatenate([of[_dealt(load[:, of], together[np.ix_(of, of)], each)] for of in numbers])


def _dealt(load: np.ndarray, together: np.ndarray, shares: int) -> np.ndarray:
    """The order of items with these loads [sources, n], in shares of equal size."""
    count = load.shape[1]
    if shares == 1:
        return np.arange(count)
    pairs, loads = together * (1.0 - np.eye(count)), _scaled(load, shares)
    found = []
    for start in range(max(1, min(_STARTS, _WORK // count**2))):
        first = generator(("arrange", start)).permutation(count) if start else np.argsort(-loads[:, 0], kind="stable")
        found.append(_evenly(loads, shares, first))
    limit = min(_unevenness(sums) for _, sums in found) + shares * _SLACK**2
    together_in = [
        _gathered(loads, pairs, share, sums, limit) for share, sums in found if _unevenness(sums) <= limit * (1 + 1e-9)
    ]
    return np.argsort(max(together_in, key=lambda one: one[0])[1], kind="stable")


def _scaled(load: np.ndarray, shares: int) -> np.ndarray:
    """[n, 1 + sources]: the loads over all text in mean loads of a share, and those on each source, where the sum of
    squares gives each source its weight."""
    rows = [(load.sum(0), 1.0)]
    if len(load) > 1:
        rows += [(of_source, _BY_SOURCE / len(load)) for of_source in load]
    return np.stack([of * (weight**0.5 * shares / max(float(of.sum()), 1e-300)) for of, weight in rows], 1)


def _unevenness(sums: np.ndarray) -> float:
    """The sum of squared differences of the loads of shares, [shares, D], from their means."""
    return float(np.square(sums - sums.mean(0)).sum())


def _gathered(
    loads: np.ndarray, pairs: np.ndarray, share: np.ndarray, sums: np.ndarray, limit: float
) -> tuple[float, np.ndarray]:
    """(the pairs inside shares, the share of each item) after swaps that bring items of the same tokens together, as
    long as the unevenness is at most `limit`."""
    count, shares = len(loads), len(sums)
    for _ in range(4 * count):
        to_share = np.stack([pairs[:, share == s].sum(1) for s in range(shares)], 1)  # [n, shares]
        own = to_share[np.arange(count), share]
        gain = to_share[:, share] - own[:, None]  # of moving a to the share of b
        gain = gain + gain.T - 2 * pairs
        gain = np.where(_unevenness(sums) + _evened(loads, share, sums) <= limit, gain, -np.inf)
        a, b = np.unravel_index(int(np.argmax(gain)), gain.shape)
        if not gain[a, b] > 1e-9 * max(1.0, float(pairs.sum())):
            break
        _swap(loads, share, sums, int(a), int(b))
    return float(pairs[share[:, None] == share[None]].sum()), share


def _evenly(loads: np.ndarray, shares: int, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the share of each item, the loads of each share [shares, D]): assigned in the order `first`, then evened out by
    swaps."""
    count = len(loads)
    share, sums = np.zeros(count, np.int64), np.zeros((shares, loads.shape[1]))
    held = np.zeros(shares, np.int64)
    for one in first:
        at = int(np.argmin(np.where(held < count // shares, sums[:, 0], np.inf)))
        share[one], sums[at], held[at] = at, sums[at] + loads[one], held[at] + 1
    for _ in range(4 * count):
        change = _evened(loads, share, sums)
        a, b = np.unravel_index(int(np.argmin(change)), change.shape)
        if not change[a, b] < -1e-9:
            break
        _swap(loads, share, sums, int(a), int(b))
    return share, sums


def _evened(loads: np.ndarray, share: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """[n, n]: by how much the unevenness changes if two items are swapped; infinite within a share."""
    change = np.zeros((len(loads), len(loads)))
    for d in range(loads.shape[1]):
        moved, of = loads[:, None, d] - loads[None, :, d], sums[share, d]
        change += 2 * moved * (moved - of[:, None] + of[None])
    return np.where(share[:, None] != share[None], change, np.inf)


def _swap(loads: np.ndarray, share: np.ndarray, sums: np.ndarray, a: int, b: int) -> None:
    sums[share[a]] += loads[b] - loads[a]
    sums[share[b]] += loads[a] - loads[b]
    share[a], share[b] = share[b], share[a]
