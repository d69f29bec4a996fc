"""Gates for CI: absolute limits on what `evaluate` measured. NaN passes no gate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moeconv.contract import Gate, NotFinite
from moeconv.errors import CheckError, UsageError

# parameter -> (the figure that it limits, whether the figure must be at least as large as the limit)
GATES: dict[str, tuple[str, bool]] = {
    "max_loss_increase": ("loss_increase", False),
    "max_kl": ("kl", False),
    "min_agreement": ("top1_agreement", True),
}


def check_limits(limits: Mapping[str, float | None], *, has_reference: bool) -> None:
    """Check the limits before anything runs.

    Raises UsageError for a limit that is not a number in its range, and for a limit without a reference.
    """
    for name, limit in limits.items():
        flag = "--" + name.replace("_", "-")
        if limit is None:
            continue
        if not math.isfinite(limit) or (name == "min_agreement" and not 0 <= limit <= 1):
            expected = "a share from 0 to 1" if name == "min_agreement" else "a finite number of nats per token"
            raise UsageError(f"{flag} {limit}: expected {expected}")
        if not has_reference:
            raise UsageError(f"{flag} needs a reference model to compare with", hint="Pass --reference MODEL.")


def judge(limits: Mapping[str, float | None], figures: Mapping[str, float]) -> dict[str, Gate]:
    """{gate: {limit, value, passed}} for every gate that has a limit. A value that is NaN becomes None and fails."""
    judged: dict[str, Gate] = {}
    for name, limit in limits.items():
        if limit is not None:
            figure, at_least = GATES[name]
            value = figures[figure]
            passed = value >= limit if at_least else value <= limit  # both are false for NaN
            judged[name] = {"limit": limit, "value": finite(value), "passed": passed}
    return judged


def failure(result: Mapping[str, Any]) -> CheckError | None:
    """The error that ends the command `evaluate` when its result did not pass a gate; None for a dry run, and when all
    gates passed."""
    if result.get("dry_run") or result["passed"]:
        return None
    problem: NotFinite | None = result["not_finite"]
    if problem is not None:
        return CheckError(f"the loss is NaN or infinite: {problem['message']}", hint=problem["hint"])
    failed = [f"{name} {g['value']} against {g['limit']}" for name, g in result["gates"].items() if not g["passed"]]
    return CheckError(f"gate failed: {'; '.join(failed)}")


def finite(value: float) -> float | None:
    """The number, or None for NaN and infinity, which JSON cannot express."""
    return value if math.isfinite(value) else None
