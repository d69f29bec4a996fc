"""The points (experts, neurons) of equal size that `prune --mix` tries, from experts alone to neurons alone."""

from __future__ import annotations

from collections.abc import Callable

from moeconv.errors import UsageError, escape
from moeconv.families.model import Model
from moeconv.families.neurons import Narrow
from moeconv.options import PlanOptions, PruneOptions, parse_size
from moeconv.prune.limits import feasible, planned_bytes
from moeconv.prune.width import multiple

Point = tuple[int, int]  # experts and neurons per layer

# The shares of the removal that are experts. The first one is the best or close to it in benchmarks/prune.py.
SHARES = (0.5, 1.0, 0.75, 0.25, 0.0)
ENDS = (1.0, 0.5, 0.0)


def points_of(model: Model, options: PruneOptions, common: PlanOptions) -> list[Point] | None:
    """The points of --ratio or --max-bytes; None where a limit of the loss decides how much is removed.

    Raises UsageError if there is no point."""
    if options.max_bytes is not None:
        return points_within(model, options, common)
    return None if options.ratio is None else points(model, options, common, ratio=options.ratio)


def points(
    model: Model, options: PruneOptions, common: PlanOptions, *, ratio: float, shares: tuple[float, ...] = SHARES
) -> list[Point]:
    """The points with at most the bytes of the experts that a prune by `ratio` leaves.

    Raises UsageError if there is no such point."""
    experts, width, unit = model.num_experts, model.expert_width, multiple(model, options, common)

    def widest(left: int) -> int:
        most = (1 - ratio) * experts * width / max(1, left) + 1e-9
        return width if most >= width else int(most // unit) * unit

    found = _line(model, options, shares, ratio * experts, widest)
    if not found:
        raise UsageError(
            f"--mix: no number of experts and neurons has at most {1 - ratio:.0%} of the experts' bytes",
            hint="Pass a smaller --ratio, or a smaller --multiple.",
        )
    return found


def points_within(model: Model, options: PruneOptions, common: PlanOptions) -> list[Point]:
    """The points whose output has at most --max-bytes. Raises UsageError if there is none."""
    limit = parse_size(str(options.max_bytes), flag="--max-bytes")
    width, unit = model.expert_width, multiple(model, options, common)

    if planned_bytes(model, common, model.num_experts, None) <= limit:
        raise UsageError(
            f"--max-bytes {escape(options.max_bytes)}: the model already has at most this size",
            hint="There is nothing to remove.",
        )

    def widest(left: int) -> int:
        if planned_bytes(model, common, left, None) <= limit:
            return width
        low, high = 0, -(-width // unit)  # the widths low * unit that fit, and high * unit that do not
        while high - low > 1:
            middle = (low + high) // 2
            fits = planned_bytes(model, common, left, middle * unit) <= limit
            low, high = (middle, high) if fits else (low, middle)
        return low * unit

    fewest = [left for left in range(1, model.num_experts) if feasible(model, left, options)]
    low, high = 0, len(fewest)  # fewest[:low] fit with all neurons
    while low < high:
        middle = (low + high) // 2
        fits = planned_bytes(model, common, fewest[middle], None) <= limit
        low, high = (middle + 1, high) if fits else (low, middle)
    lowest = fewest[max(0, low - 1)] if fewest else model.num_experts
    found = _line(model, options, SHARES, model.num_experts - lowest, widest)
    if not found:
        raise UsageError(
            f"--max-bytes {escape(options.max_bytes)} is too small for any number of experts and neurons",
            hint="Allow more bytes, pass a smaller --multiple, or quantize the model too.",
        )
    return found


def _line(
    model: Model, options: PruneOptions, shares: tuple[float, ...], removed: float, widest: Callable[[int], int]
) -> list[Point]:
    """The points for each share of the `removed` experts, with as many neurons as `widest` allows for their number of
    experts. A number of experts that the router cannot have, and a width with which a matrix would be ambiguous, are
    left out."""
    experts, width = model.num_experts, model.expert_width
    found: list[Point] = []
    for share in shares:
        left = experts - round(share * removed)
        left -= left % model.groups[0]
        if left != experts and not feasible(model, left, options):
            continue
        neurons = widest(left)
        if neurons and not (neurons < width and Narrow(model, neurons).ambiguous):
            found.append((left, neurons))
    return list(dict.fromkeys(found))
