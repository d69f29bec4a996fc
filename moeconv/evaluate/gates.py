"""Gates for CI: absolute limits on what `evaluate` measured. NaN passes no gate."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from moeconv.contract import Gate, NotFinite
from moeconv.errors import CheckError, UsageError


@dataclass(frozen=True)
class GateRule:
    """The figure that a parameter limits, whether it must be at least as large as the limit, what measures it (`data`
    or `tasks`), whether a reference is needed, and whether the limit is a share."""

    figure: str
    at_least: bool
    source: str = "data"
    compares: bool = True
    share: bool = False


GATES: dict[str, GateRule] = {
    "max_loss_increase": GateRule("loss_increase", at_least=False),
    "max_kl": GateRule("kl", at_least=False),
    "min_agreement": GateRule("top1_agreement", at_least=True, share=True),
    "min_accuracy": GateRule("accuracy", at_least=True, source="tasks", compares=False, share=True),
    "max_accuracy_drop": GateRule("accuracy_drop", at_least=False, source="tasks", share=True),
}


def check_limits(limits: Mapping[str, float | None], *, has_reference: bool, sources: Container[str]) -> None:
    """Check the limits before anything runs. `sources` are those of `data` and `tasks` that were given.

    Raises UsageError for a limit that is not a number in its range, and for a limit of what will not be measured.
    """
    for name, limit in limits.items():
        flag, rule = "--" + name.replace("_", "-"), GATES[name]
        if limit is None:
            continue
        if not math.isfinite(limit) or (rule.share and not 0 <= limit <= 1):
            expected = "a share from 0 to 1" if rule.share else "a finite number of nats per token"
            raise UsageError(f"{flag} {limit}: expected {expected}")
        if rule.compares and not has_reference:
            raise UsageError(f"{flag} needs a reference model to compare with", hint="Pass --reference MODEL.")
        if rule.source not in sources:
            raise UsageError(f"{flag} needs --{rule.source}", hint=f"Pass --{rule.source} FILE.")


def check_sources(
    sources: Container[str], *, questions: int | None, tokens: int | None, batch_size: int
) -> None:  # fmt: skip
    """Check the numbers of what is read before anything is. `sources` are those of `data` and `tasks` that were given.

    Raises UsageError for a number below 1, and for one that limits what was not given.
    """
    for flag, number, source in (("--questions", questions, "tasks"), ("--tokens", tokens, "data")):
        if number is not None and number < 1:
            raise UsageError(f"{flag} {number}: expected at least 1")
        if number is not None and source not in sources:
            raise UsageError(f"{flag} goes with --{source}", hint=f"Pass --{source} FILE, or leave out {flag}.")
    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size}: expected at least 1")


def judge(limits: Mapping[str, float | None], figures: Mapping[str, float]) -> dict[str, Gate]:
    """{gate: {limit, value, passed}} for every gate that has a limit. A value that is NaN becomes None and fails."""
    judged: dict[str, Gate] = {}
    for name, limit in limits.items():
        if limit is not None:
            rule = GATES[name]
            value = figures[rule.figure]
            passed = value >= limit if rule.at_least else value <= limit  # both are false for NaN
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
    failed = [
        f"{name} {'NaN' if g['value'] is None else format(g['value'], '.4f')} against {g['limit']}"
        for name, g in result["gates"].items() if not g["passed"]
    ]  # fmt: skip
    return CheckError(
        f"gate failed: {'; '.join(failed)}", hint="Tune the model, prune or quantize it less, or change the limit."
    )


def finite(value: float) -> float | None:
    """The number, or None for NaN and infinity, which JSON cannot express."""
    return value if math.isfinite(value) else None
