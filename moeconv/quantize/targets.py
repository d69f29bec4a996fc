"""Which runtimes load what: the check of --target, and the warnings for what a runtime was not proven to load."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from moeconv.errors import UsageError, did_you_mean, escape
from moeconv.families.measured import RUNTIMES
from moeconv.families.served import TARGETS
from moeconv.families.spec import Family
from moeconv.quantize.spec import Format

_SOFTMAX = (
    "the kernel of its CPU backend is for routers that are a softmax and nothing else, and this family's scores by "
    "sigmoid or has a correction bias; on a GPU it was not run"
)


def _softmax_alone(family: Family) -> bool:
    """Whether the router is a softmax without a correction of the choice: all that vLLM's CPU kernel computes."""
    corrected = any(key.startswith("router.correction") for key in family.tensors.names)
    return family.experts.routing is not None and family.experts.routing.score.startswith("softmax") and not corrected


def _measured(format: Format, scheme: str, *, mixed: bool) -> Mapping[str, Mapping[str, str]]:
    """Runtime that was run -> family -> what was found."""
    return format.mixed_measured if mixed else format.scheme(scheme).measured


def versions(measured: Mapping[str, Mapping[str, str]]) -> dict[str, str | None]:
    """Runtime -> the version that was run, None if it was not run, so that what is known is from its source or
    documentation."""
    return {runtime: RUNTIMES[runtime] if runtime in measured else None for runtime in TARGETS}


def every_runtime(loads: Mapping[str, str]) -> dict[str, str]:
    """Runtime -> whether it loads the format; unknown where the format does not state it."""
    return {runtime: loads.get(runtime, "unknown") for runtime in TARGETS}


def loads_of(format: Format, scheme: str, family: Family, *, mixed: bool = False) -> dict[str, str]:
    """Runtime -> whether it loads a model of `family` in this scheme. `mixed`: bits differ by layer. Multimodal models
    were tried with transformers alone, since every engine has its own names for their modules. Packed tensors of all
    experts have names that only the loader of moeconv knows."""
    loads = every_runtime(format.mixed if mixed else format.scheme(scheme).loads)
    found = {runtime: rows.get(family.model_type) for runtime, rows in _measured(format, scheme, mixed=mixed).items()}
    if loads["vllm"] == "ok" and found.get("vllm") is None and not _softmax_alone(family):
        loads["vllm"] = "unknown"  # its CPU backend refuses others of this kind, measured; on a GPU not run
    loads |= {runtime: "unknown" for runtime, word in found.items() if word == "refused" and loads[runtime] != "no"}
    loads |= {"transformers": "no"} if format.name in family.elsewhere.not_loaded else {}
    if family.tensors.packed and format.stack is not None and not format.packs_as_stored(family):
        return {runtime: word if runtime == "transformers" else "no" for runtime, word in loads.items()}
    if family.only_served:
        loads |= {"transformers": "no"}  # its class stacks the experts, and no conversion of transformers does
    if family.remote is not None:
        loads |= {"transformers": "unknown"}  # its own class, which is code in the checkpoint, was never run
    if family.multimodal.beside:
        loads |= {runtime: "unknown" for runtime, word in loads.items() if runtime != "transformers" and word != "no"}
    return loads


def _least(words: Sequence[str]) -> str:
    """What is known of a combination: the worst of what is known of its parts, or else the last word."""
    return next((word for word in ("no", "unknown") if word in words), words[-1])


def loads_by_layer(format: Format, schemes: Iterable[str], family: Family) -> dict[str, str]:
    """Runtime -> whether it loads a model of `family` with these schemes by layer."""
    others = [loads_of(format, name, family) for name in schemes if name not in format.mixes]
    known = [*others, loads_of(format, "", family, mixed=True)]
    return {runtime: _least([loads[runtime] for loads in known]) for runtime in TARGETS}


def loads_beside(format: Format, scheme: str, rest: str, family: Family, *, mixed: bool = False) -> dict[str, str]:
    """Runtime -> whether it loads a model of `family` with experts in one scheme and the `rest` in another: `no` where
    it does not load one of the two or their combination, otherwise what is known of the combination."""
    both = [loads_of(format, scheme, family, mixed=mixed), loads_of(format, rest, family)]
    both += [every_runtime(format.beside_loads)]
    return {runtime: _least([loads[runtime] for loads in both]) for runtime in TARGETS}


def check_rest(format: Format, scheme: str, rest: str, targets: Sequence[str], *, family: Family) -> list[str]:
    """Warnings about targets that were not proven to load experts in one scheme and the rest in another. Raises
    UsageError for a target that cannot."""
    loads, what = loads_beside(format, scheme, rest, family), f"{format.name} {scheme} with --rest {rest}"
    for target in targets:
        if loads[target] == "no":
            raise UsageError(f"--target {target} cannot load {what}", hint="Leave out --rest or --target.")
    return [f"{target} was not proven to load {what}" for target in targets if loads[target] == "unknown"]


def check_targets(
    format: Format, scheme: str, targets: Sequence[str], *, family: Family, mixed: bool = False,
    hidden: int | None = None,
) -> list[str]:  # fmt: skip
    """Warnings about targets that were not proven to load the output. Raises UsageError for a target that is unknown or
    cannot load it.

    `mixed`: bits differ by layer. `hidden` is the hidden size of the model."""
    loads, measured = loads_of(format, scheme, family, mixed=mixed), _measured(format, scheme, mixed=mixed)
    what = f"{format.name} {'with bits that differ by layer' if mixed else scheme}"
    warnings = []
    for target in targets:
        if target not in TARGETS:
            raise UsageError(f"--target {escape(target)} is not a known runtime", hint=did_you_mean(target, TARGETS))
        if loads[target] == "no":
            raise UsageError(f"--target {target} cannot load {what}", hint="`moeconv formats` shows what it loads.")
        if loads[target] == "unknown":
            note = format.notes.get(target) if target != "vllm" or _softmax_alone(family) else _SOFTMAX
            refused = measured.get(target, {}).get(family.model_type) == "refused"
            tried = f"; {RUNTIMES[target]} refused a small random {family.model_type} of it" if refused else ""
            warnings.append(f"{target} was not proven to load {what}" + (f": {note}" if note else "") + tried)
        else:
            warnings += _doubts(measured.get(target), target, what, family.model_type)
        if hidden is not None:
            warnings += format.remarks(target, hidden)
    return warnings


def _doubts(rows: Mapping[str, str] | None, target: str, what: str, model_type: str) -> list[str]:
    """The warnings about a runtime that is listed as one that loads a format. `rows`: family -> what was found when it
    was run; None if it was not run."""
    if rows is None:
        return [f"{target} should load {what} according to its source or documentation; it was not run with it here"]
    if rows and model_type not in rows:
        return [f"{RUNTIMES[target]} loads {what} of other families; {model_type} was not run with it"]
    if rows.get(model_type) == "differs":
        return [f"{RUNTIMES[target]} computes something different from transformers with {what} of {model_type}"]
    return []
