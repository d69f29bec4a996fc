"""Which serving engines run a Mixture-of-Experts family, as its row says (`Elsewhere.runs`, from the engines' public
lists of models). Whether an engine that is in neither set of the row runs the family is unknown."""

from __future__ import annotations

from collections.abc import Sequence

from moeconv.errors import UsageError, did_you_mean, escape
from moeconv.families.measured import doubts
from moeconv.families.registry import tables
from moeconv.families.spec import Family

TARGETS = ("transformers", "vllm", "sglang", "llama.cpp")


def served(model_type: str, target: str) -> str:
    """ok, no or unknown. Every family of the tables runs in transformers."""
    if target == "transformers":
        return "ok"
    family = _row(model_type)
    if family is None:
        return "unknown"
    return "ok" if target in family.elsewhere.runs else "no" if target in family.elsewhere.runs_not else "unknown"


def _row(model_type: str) -> Family | None:
    known = tables()
    wrapped = known.wrapped.get(model_type)
    return next(iter(wrapped.values())) if wrapped else known.families.get(model_type)


def check_served(model_type: str, targets: Sequence[str]) -> list[str]:
    """Warnings about runtimes that may or may not run the family, or were not measured to. Raises UsageError for an
    unknown runtime, and for one that does not run the family."""
    warnings = []
    for target in targets:
        if target not in TARGETS:
            raise UsageError(f"--target {escape(target)}: unknown runtime", hint=did_you_mean(target, TARGETS))
        found = served(model_type, target)
        if found == "no":
            raise UsageError(
                f"--target {target} does not run {model_type}", hint="`moeconv families` lists the others."
            )
        if found == "unknown":
            warnings.append(f"nothing says that {target} runs {model_type}")
        else:
            warnings += doubts(model_type, target)
    return warnings
