"""Bits by layer: the schemes whose error, weighted by what a layer matters, is least within a budget of bytes.

minimise sum_l importance_l * error(scheme_l) subject to sum_l bytes(scheme_l) <= budget (MC-MoE, arXiv 2410.06270, by
layer: no runtime loads bits that differ by expert). Greedy on each layer's lower convex hull; no torch, no bytes read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moeconv.errors import UsageError, escape
from moeconv.options import QuantizeOptions, parse_size
from moeconv.quantize.formats import FORMATS
from moeconv.quantize.spec import MIXED, Format, Scheme


def candidates(format: Format, groups: Sequence[int | None]) -> list[Scheme]:
    """The schemes that layers choose from. `groups` are the group sizes that divide every width, largest first: all of
    them for the narrower schemes, the largest for the widest."""
    *narrow, wide = (format.scheme(name) for name in format.mixes)
    return [
        *(Scheme(info.name, info.bits, group) for info in narrow for group in groups),
        Scheme(wide.name, wide.bits, groups[0]),
    ]


def hull(options: Sequence[tuple[int, float]]) -> list[int]:
    """Indices of the options (bytes, error) on the lower convex hull, from the smallest up, error falling."""
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
    """Error that a byte saves between two options."""
    return (options[a][1] - options[b][1]) / max(1, options[b][0] - options[a][0])


def allocate(layers: Sequence[Sequence[tuple[int, float]]], budget: int) -> list[int] | None:
    """The index of each layer's option (bytes, error) for the least sum of errors within `budget` bytes, None when even
    the smallest do not fit. Upgrades go in the order of error saved by a byte; one that does not fit is passed over, so
    that the result misses the linear program's bound by less than one upgrade.
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


def check_mixed(options: QuantizeOptions, format: Format, importance: Mapping[int, float] | None) -> None:
    """Raises UsageError for parameters that do not go together, or missing statistics."""
    if options.scheme != MIXED:
        for flag, value in (("--average-bits", options.average_bits), ("--max-bytes", options.max_bytes)):
            if value is not None:
                raise UsageError(f"{flag} goes with --scheme mixed", hint="Add --scheme mixed --stats STATS.")
        if options.stats:
            raise UsageError("--stats goes with --scheme mixed", hint="Other schemes need no importance.")
        return
    mixing = [f for f in FORMATS.values() if f.mixes]
    if not format.mixes:
        raise UsageError(
            f"--scheme mixed is not for --format {format.name}",
            hint=f"Use --format {' or '.join(f.name for f in mixing)}.",
        )
    if (options.average_bits is None) == (options.max_bytes is None):
        raise UsageError("--scheme mixed needs one of --average-bits and --max-bytes", hint="Try --average-bits 5.")
    if options.average_bits is not None and not 0 < options.average_bits <= 32:
        raise UsageError(f"--average-bits {options.average_bits} must lie between 0 and 32")
    if options.scope != "experts" or options.double_quant:
        flag = "--double-quant" if options.double_quant else f"--scope {options.scope}"
        raise UsageError(f"{flag} does not go with --scheme mixed", hint="Leave it out.")
    if format.mixed.get("transformers") == "no" and not options.target:
        able = [runtime for runtime, word in format.mixed.items() if word == "ok"]
        others = [f.name for f in mixing if f.mixed.get("transformers") == "ok"]
        raise UsageError(
            f"transformers cannot load {format.name} with bits that differ by layer",
            hint=f"Say which runtime will: --target {' or '.join(able)}; or use --format {' or '.join(others)}.",
        )
    if importance is None:
        raise UsageError(
            "--scheme mixed decides by the importance of the layers",
            hint="Make statistics: moeconv calibrate MODEL STATS --data FILE; then pass --stats STATS.",
        )


def byte_budget(options: QuantizeOptions, *, weights: int, beside: int) -> int:
    """Bytes for the experts' codes and scales: `weights` is how many they are, `beside` the bytes of all else."""
    if options.average_bits is not None:
        return int(options.average_bits * weights / 8)
    return parse_size(str(options.max_bytes), flag="--max-bytes") - beside


def too_small(options: QuantizeOptions, least: int, weights: int) -> UsageError:
    """The budget's error, with the least that is possible."""
    if options.average_bits is not None:
        return UsageError(
            f"--average-bits {options.average_bits}: the smallest scheme takes {least * 8 / weights:.3f}",
            hint="Give more, or a larger --group-size.",
        )
    return UsageError(f"--max-bytes {escape(options.max_bytes)}: too small", hint="Give more, or prune first.")
