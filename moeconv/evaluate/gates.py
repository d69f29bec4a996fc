"""Gates for CI: absolute limits on what evaluate measured. NaN passes none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moeconv.errors import CheckError, UsageError

# parameter -> (figure that it limits, whether the figure must be at least the limit)
GATES: dict[str, tuple[str, bool]] = {
    "max_loss_increase": ("loss_increase", False),
    "max_kl": ("kl", False),
    "min_agreement": ("top1_agreement", True),
}


def check_limits(limits: Mapping[str, float | None], *, has_reference: bool) -> None:
    """Raises UsageError, before anything runs, for a limit that is no number or a gate without a reference."""
    for name, limit in limits.items():
        flag = "--" + name.replace("_", "-")
        if limit is None:
            continue
        if not math.isfinite(limit) or (name == "min_agreement" and not 0 <= limit <= 1):
            expected = "a share from 0 to 1" if name == "min_agreement" else "a number of nats per token"
            raise UsageError(f"{flag} {limit}: expected {expected}")
        if not has_reference:
            raise UsageError(f"{flag} compares with a reference", hint="Pass --reference MODEL.")


def judge(limits: Mapping[str, float | None], figures: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """{gate: {limit, value, passed}} for every gate that has a limit."""
    judged = {}
    for name, limit in limits.items():
        if limit is not None:
            figure, at_least = GATES[name]
            value = figures[figure]
            passed = value >= limit if at_least else value <= limit  # both are false for NaN
            judged[name] = {"limit": limit, "value": finite(value), "passed": passed}
    return judged


def failure(result: Mapping[str, Any]) -> CheckError | None:
    """What evaluate's JSON object ends the command with, where it did not pass."""
    if result.get("dry_run") or result["passed"]:
        return None
    if result.get("not_finite"):
        return CheckError(f"the loss is NaN or infinite: {result['not_finite']['message']}",
                          hint=result["not_finite"]["hint"])  # fmt: skip
    failed = [f"{name} {g['value']} against {g['limit']}" for name, g in result["gates"].items() if not g["passed"]]
    return CheckError(f"gate failed: {'; '.join(failed)}")


def finite(value: float) -> float | None:
    """The number, or None where JSON has no word for it."""
    return value if math.isfinite(value) else None
