"""Which serving engines run a Mixture-of-Experts family, according to its row (`Elsewhere.runs` and `runs_not`, from
the engines' public lists of models). For an engine in neither set it is unknown."""

from __future__ import annotations

from collections.abc import Sequence

from moeconv.errors import UsageError, did_you_mean, escape
from moeconv.families.measured import LISTED, MEASURED, doubts
from moeconv.families.registry import tables
from moeconv.families.spec import Family

TARGETS = ("transformers", "vllm", "sglang", "llama.cpp", "mlx")
ENGINES = ("vllm", "sglang", "llama.cpp", "mlx")  # of the table of `moeconv families`


def served(model_type: str, target: str) -> str:
    """Whether the engine `target` runs the family: "ok", "no" or "unknown". transformers runs every known family."""
    if target == "transformers":
        return "ok"
    if target in LISTED:
        return "ok" if model_type in LISTED[target] else "no"
    family = _row(model_type)
    if family is None:
        return "unknown"
    return "ok" if target in family.elsewhere.runs else "no" if target in family.elsewhere.runs_not else "unknown"


def evidence(model_type: str, engine: str) -> str:
    """How an engine runs the family, in one word: "same", "differs" or "refused" where it was measured, else "listed",
    "no" or "unknown"."""
    measured = MEASURED.get(engine, {}).get(model_type)
    if measured is not None:
        return measured.found
    if engine in LISTED:
        return "listed" if model_type in LISTED[engine] else "no"
    found = served(model_type, engine)
    return "listed" if found == "ok" else found


def _row(model_type: str) -> Family | None:
    known = tables()
    wrapped = known.wrapped.get(model_type)
    return next(iter(wrapped.values())) if wrapped else known.families.get(model_type)


def check_served(model_type: str, targets: Sequence[str]) -> list[str]:
    """Warnings about the runtimes `targets`: those that may not run the family, or were not measured with it.

    Raises UsageError for an unknown runtime, and for one that does not run the family.
    """
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
            warnings.append(f"{target} is not known to run {model_type}")
        else:
            warnings += doubts(model_type, target)
    return warnings
