"""Is the staged model its source's function? Asked of a child process, so that a conversion never imports transformers.

Both models are streamed a decoder layer at a time, so what must fit into memory is a layer and the embeddings.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from moeconv.errors import CheckError, escape
from moeconv.families.model import Model
from moeconv.families.pairs import promise
from moeconv.plan.plan import Plan

EXACT_RELATIVE = 1e-5  # of the spread of the logits
NOT_CHECKED = {"checked": False, "max_abs_logit_diff": None, "relative": None, "tokens": 0}
_TOKENS = 128
_LAYERS_HELD = 2.5  # a layer in the compared dtype, the next one's bytes, and the converter's stacking


def equivalence(model: Model, staged: Path, plan: Plan) -> dict[str, Any]:
    """{equivalence: figures at the chosen top-k, and with all experts on}, or why it was not checked as a warning.

    Raises CheckError where transformers cannot run the staged model, or a promise of exactness is broken.
    """
    free = _free_memory()
    dtype = next((name for name, width in (("float64", 8), ("float32", 4)) if _needed(plan, width) < free * 0.8), None)
    if dtype is None:
        text = f"not checked against the source: its largest layer takes {_needed(plan, 4)} bytes, {free} are free"
        return {"equivalence": dict(NOT_CHECKED), "warnings": [text]}
    command = [sys.executable, "-m", "moeconv.evaluate.equivalence", str(model.checkpoint.path), str(staged)]
    command += ["--dtype", dtype, "--tokens", str(_TOKENS)]
    child = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    try:
        found = json.loads(child.stdout)
    except ValueError:
        found = {"error": child.stderr.strip().splitlines()[-1] if child.stderr.strip() else f"exit {child.returncode}"}
    if "error" in found or not found.get("strict_load"):
        why = found.get("error") or "; ".join(found["problems"][:3])
        raise CheckError(
            f"transformers cannot run the written model: {escape(why)}",
            hint="Nothing was written. Please report it with this message.",
        )
    allowed, unless = promise(plan.block["from"], plan.block["to"])
    limit = max(EXACT_RELATIVE, allowed)
    for which, figures in (("", found), (" with all experts on", found.get("all_on"))):
        if plan.block["exact"] and figures and not figures["relative"] <= limit:
            raise CheckError(
                f"the written model differs from its source{which} by {figures['relative']:.2e} of the logits' spread",
                hint=f"Nothing was written. The pair is exact unless {unless}; --no-check writes it all the same."
                if unless
                else "Nothing was written. This method promises exactness; please report it.",
            )
    return {"equivalence": {"checked": True, **found}}


def _needed(plan: Plan, width: int) -> int:
    """Bytes that the child takes at its peak: the largest layer, the embeddings, the logits of both models."""
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


def _free_memory() -> int:
    """Bytes that Linux says are available to a new process."""
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0
