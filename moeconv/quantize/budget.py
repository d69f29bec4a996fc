"""The bits of least error within a budget of bytes, for what may each have bits of its own: layers, or tensors.

minimise sum_l importance_l * error(scheme_l) subject to sum_l bytes(scheme_l) <= budget (MC-MoE, arXiv 2410.06270, by
layer: no runtime loads bits that differ by expert). Greedy on each layer's lower convex hull; no torch, no bytes read.
"""

from __future__ import annotations

from collections.abc import Sequence

from moeconv.errors import UsageError, escape
from moeconv.options import QuantizeOptions, parse_size


def hull(options: Sequence[tuple[int, float]]) -> list[int]:
    """Indices of the options (bytes, error) on the lower convex hull: bytes ascend, the error descends."""
    order = sorted(range(len(options)), key=lambda i: (options[i][0], options[i][1]))
    kept: list[int] = []
    for i in order:
        if kept and options[i][1] >= options[kept[-1]][1]:
            continue
        while len(kept) > 1 and _slope(options, kept[-2], kept[-1]) <= _slope(options, kept[-1], i):
            kept.pop()
        if kept and options[i][0] == options[kept[-1]][0]:
            kept.pop()
        kept.append(i)
    return kept


def _slope(options: Sequence[tuple[int, float]], a: int, b: int) -> float:
    """The error that each byte more saves, from option `a` to option `b`."""
    return (options[a][1] - options[b][1]) / max(1, options[b][0] - options[a][0])


def allocate(layers: Sequence[Sequence[tuple[int, float]]], budget: int) -> list[int] | None:
    """The index of each layer's option (bytes, error) for the least sum of errors within `budget` bytes; None when even
    the smallest options do not fit.

    Upgrades are taken in the order of the error that they save per byte. One that does not fit is skipped, so that the
    result is worse than the bound of the linear program by less than one upgrade.
    """
    hulls = [hull(options) for options in layers]
    chosen = [h[0] for h in hulls]
    left = budget - sum(layers[i][c][0] for i, c in enumerate(chosen))
    if left < 0:
        return None
    steps = [(-_slope(layers[i], h[n], h[n + 1]), i, n) for i, h in enumerate(hulls) for n in range(len(h) - 1)]
    stopped: set[int] = set()
    for _, i, n in sorted(steps):
        cost = layers[i][hulls[i][n + 1]][0] - layers[i][hulls[i][n]][0]
        if i in stopped or cost > left:
            stopped.add(i)  # its further upgrades build on this one
            continue
        chosen[i], left = hulls[i][n + 1], left - cost
    return chosen


def byte_budget(options: QuantizeOptions, *, weights: int, beside: int) -> int:
    """The bytes for the experts' codes and scales. `weights` is the number of weights, `beside` the bytes of everything
    else in the files."""
    if options.average_bits is not None:
        return int(options.average_bits * weights / 8)
    return parse_size(str(options.max_bytes), flag="--max-bytes") - beside


def too_small(options: QuantizeOptions, least: int, weights: int) -> UsageError:
    """The error of a budget that is too small; `least` is the number of bytes that the smallest schemes take."""
    if options.average_bits is not None:
        return UsageError(
            f"--average-bits {options.average_bits} is too small: the smallest scheme takes {least * 8 / weights:.3f}",
            hint="Raise --average-bits, or give a larger --group-size.",
        )
    return UsageError(
        f"--max-bytes {escape(options.max_bytes)} is too small for this model",
        hint="Raise --max-bytes, or prune first.",
    )
