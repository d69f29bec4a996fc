"""Does the staged model compute what its source computes? A child process answers, so that a conversion imports no
transformers.

Both models are streamed one decoder layer at a time, so that a layer and the embeddings must fit into memory.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from moeconv.errors import CheckError, InputError, escape
from moeconv.families.model import Model
from moeconv.families.pairs import promise
from moeconv.plan.memory import free_memory
from moeconv.plan.plan import Plan
from moeconv.types import JsonObject
from moeconv.upcycle.counterpart import counterpart
from moeconv.upcycle.siblings import Sibling, checkpoints, place_of

EXACT_RELATIVE = 1e-5  # of the spread of the logits
NOT_CHECKED = {"checked": False, "max_abs_logit_diff": None, "relative": None, "tokens": 0}
LONG = 1 << 30  # bytes of a result before which the source is tried: writing them takes longer than trying
_TOKENS = 128
_LAYERS_HELD = 2.5  # a layer in the compared dtype, the bytes of the next one, and the stacking of its experts


def equivalence(
    model: Model, staged: Path, plan: Plan, *, siblings: Sequence[Sibling] = (), partition: Path | None = None,
    added: Sequence[str] = (),
) -> JsonObject:  # fmt: skip
    """{equivalence, warnings}: `equivalence` is the contract's block of that name. Where memory does not suffice for
    the check, a warning says so.

    A model that is not exact by design is compared with its exact counterpart; `siblings` and `partition` are those
    that the plan was made with, `added` the directories of --add-experts-from.

    Raises InputError where the source does not run in transformers; CheckError where the
    staged model does not run, or does not compute what the plan promises.
    """
    free = free_memory()
    dtype = _dtype_within(plan, free)
    if dtype is None:
        text = f"not checked against the source: its largest layer takes {_needed(plan, 4)} bytes, {free} are free"
        return {"equivalence": dict(NOT_CHECKED), "warnings": [text]}
    found = _measured(
        model, staged, plan, dtype, siblings=[*added] or [str(place_of(one)) for one in siblings], partition=partition,
        links=checkpoints(siblings),
    )  # fmt: skip
    _check_source(found)
    if "error" in found or not found.get("strict_load"):
        why = found.get("error") or "; ".join(found["problems"][:3])
        raise CheckError(
            f"transformers cannot run the written model: {escape(why)}",
            hint=f"Nothing was written. {found.get('hint', 'The source runs; please report it with this message.')}",
        )
    _check_exact(plan, found)
    warnings = _check_default_run(plan, found["default_run"])
    return {"equivalence": {"checked": True, **found}, "warnings": warnings}


def check_source(model: Model, plan: Plan) -> None:
    """Raises InputError, before anything is written, where the source's first layer does not run in transformers. Of a
    plan that is written in seconds nothing is asked: `equivalence` finds out as soon."""
    dtype = _dtype_within(plan, free_memory())
    if dtype is not None and plan.nbytes >= LONG:
        command = [sys.executable, "-m", "moeconv.upcycle.check.compare", str(model.checkpoint.path), "--dtype", dtype]
        _check_source(_child([*command, *_links(model)]))


def _check_source(found: JsonObject) -> None:
    if found.get("of") == "source":
        raise InputError(
            f"the source itself does not run in transformers: {escape(found['error'])}",
            hint="Nothing was written. Repair the source, or pass --no-check to write the result without this check.",
        )


def _dtype_within(plan: Plan, free: int) -> str | None:
    """The dtype in which the check has room in memory."""
    return next((name for name, width in (("float64", 8), ("float32", 4)) if _needed(plan, width) < free * 0.8), None)


def _links(*models: Model) -> list[str]:
    return ["--follow-links"] if any(m.checkpoint.follows_links for m in models) else []


def _measured(
    model: Model, staged: Path, plan: Plan, dtype: str, *, siblings: Sequence[str], partition: Path | None,
    links: Sequence[Model],
) -> JsonObject:  # fmt: skip
    """The JSON object that the child process prints."""
    command = [sys.executable, "-m", "moeconv.upcycle.check.compare", str(model.checkpoint.path), str(staged)]
    command += ["--dtype", dtype, "--tokens", str(_TOKENS), *_links(model, *links)]
    request = ""
    if (exact := counterpart(plan)) is not None:
        command.append("--against")
        request = json.dumps(
            {
                "counterpart": exact.to_json(),
                "siblings": [*siblings],
                "partition": str(partition) if partition else None,
            }
        )
    return _child(command, request)


def _child(command: Sequence[str], request: str = "") -> JsonObject:
    """The JSON object that a child process prints, or its last words as an error."""
    child = subprocess.run(command, capture_output=True, text=True, input=request, check=False)
    try:
        found: JsonObject = json.loads(child.stdout)
        return found
    except ValueError:
        return {"error": child.stderr.strip().splitlines()[-1] if child.stderr.strip() else f"exit {child.returncode}"}


def _check_exact(plan: Plan, found: JsonObject) -> None:
    """Raises CheckError where the logits differ by more than the bound: those of the model itself where it is exact,
    and those of its exact counterpart where it is not."""
    allowed, unless = promise(plan.block["from"], plan.block["to"])
    limit = max(EXACT_RELATIVE, allowed)
    compared = {"the written model": found, "the written model with all experts on": found.get("all_on")}
    if (exact := found.get("counterpart")) is not None:
        compared = {"the written model, with its experts as in the source,": exact}
    for which, figures in compared.items():
        if figures and not figures["relative"] <= limit:
            raise CheckError(
                f"{which} differs from its source by {figures['relative']:.2e} of the logits' spread",
                hint=f"Nothing was written. The pair is exact unless {unless}: --no-check writes the result anyway."
                if unless
                else f"Nothing was written. Rounding explains at most {limit:.0e}: please report it.",
            )
    if exact is not None and exact["difference"]:
        raise CheckError(
            f"the written model is not as planned: tensor {escape(exact['difference'])}",
            hint="Nothing was written. Please report it.",
        )


def _check_default_run(plan: Plan, problem: str | None) -> list[str]:
    """Raises CheckError where the model does not run with the defaults, unless the plan has warned of that reason."""
    if problem is None:
        return []
    text = f"the written model does not run with transformers' defaults: {escape(problem)}"
    if problem in "\n".join(plan.warnings):
        return []
    raise CheckError(text, hint="Nothing was written. The source runs; please report it with this message.")


def _needed(plan: Plan, width: int) -> int:
    """The bytes that the child process takes at its peak: the largest layer, the embeddings, and both models'
    logits."""
    layers: dict[str, int] = {}
    outside = 0
    for item in plan.items():
        for spec in item.outputs:
            place = next((word for word in spec.name.split(".") if word.isdecimal()), None)
            count = math.prod(spec.shape)
            if place is None:
                outside = max(outside, count)
            else:
                layers[place] = layers.get(place, 0) + count
    vocabulary = plan.config.get("vocab_size") or 0
    logits = 3 * _TOKENS * (vocabulary if isinstance(vocabulary, int) else 0) * width
    return int(_LAYERS_HELD * max(layers.values(), default=0) * width + 2 * outside * width + logits) + (1 << 29)
