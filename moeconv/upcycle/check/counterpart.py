"""Does an inexact upcycle equal its exact counterpart, up to rounding and to what its method may change?

The counterpart (upcycle/counterpart.py) is made in memory, one tensor at a time, with the config.json that was written.
A damaged config shows in its logits, and a damaged tensor in the comparison of the tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moeconv.checkpoint.header import FLOAT_DTYPES
from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.families.model import Model
from moeconv.options import UpcycleOptions, from_keywords
from moeconv.plan.flow import ByteSource
from moeconv.plan.kernels.arrays import to_float32
from moeconv.plan.partition import ORIGIN as PARTITION
from moeconv.plan.partition import load_partition
from moeconv.plan.planned import planned_model
from moeconv.upcycle.added import Added, origins_of_added
from moeconv.upcycle.added_sources import open_added
from moeconv.upcycle.counterpart import Drift, ExactCounterpart
from moeconv.upcycle.planner import origins_of, plan_upcycle
from moeconv.upcycle.siblings import open_siblings

# relative and absolute distance of a value from the float32 value that it was rounded from: twice half an ulp
_ROUNDING = {"BF16": (2.0**-8, 1e-38), "F16": (2.0**-10, 1e-7), "F32": (1e-6, 1e-37), "F64": (1e-6, 1e-37)}
_F16_LARGEST = 5.9e4  # planners clip larger values
_BLOCK = 1 << 22  # values that are compared at a time


@dataclass(frozen=True)
class CounterpartModels:
    """`run` is the model whose logits are compared with the source's. `written` is the model whose tensors the written
    model must have. They differ where the experts are made of siblings: `run` has the FFNs of the source instead."""

    run: Model
    written: Model


def make_counterpart(
    source: Model, staged: Model, exact: ExactCounterpart, folder: Path, *, siblings: Sequence[str] = (),
    partition: str | None = None,
) -> CounterpartModels:  # fmt: skip
    """The counterpart's models. The config.json that transformers builds the classes from is written to `folder`."""
    opened_experts: list[Added] = []
    measured = load_partition(partition) if partition else None
    origins: dict[str, ByteSource] = {"source": source.checkpoint}
    if measured is not None:
        origins[PARTITION] = measured.file
    copies = None if exact.copies is None else {int(layer): of for layer, of in exact.copies.items()}
    parameters = dict(exact.parameters)
    if exact.added:
        parameters["add_experts_from"] = tuple(siblings)
        opened_experts = open_added(source, from_keywords(UpcycleOptions, parameters))
        origins |= origins_of_added(opened_experts)
        copies = None
    plan = plan_upcycle(source, partition=measured, copies=copies, added=opened_experts, **parameters)
    config = dict(staged.checkpoint.config)
    for key in {*plan.config, *exact.config}:
        if plan.config.get(key) != exact.config.get(key):
            config.pop(key, None)
            config |= {key: plan.config[key]} if key in plan.config else {}
    plan = replace(plan, config=config)
    (folder / "config.json").write_text(json.dumps(config))
    run = planned_model(plan, companions=folder, origins=origins)
    if not exact.siblings:
        return CounterpartModels(run if exact.copies is None else staged, run)
    opened = open_siblings(source, siblings, ffn_only=exact.parameters.get("ffn_only", False))
    other = plan_upcycle(source, siblings=opened, **exact.parameters)
    return CounterpartModels(run, planned_model(other, companions=folder, origins=origins | origins_of(opened)))


def first_difference(made: CounterpartModels, staged: Model, exact: ExactCounterpart) -> str | None:
    """The first tensor of the written model that differs from the counterpart's, and how; None where none does."""
    for name, role in made.written.roles.items():
        theirs = staged.checkpoint.tensors.get(name)
        if theirs is None:
            return f"{name} is missing"
        if role.group == "router" and exact.measured:
            continue
        drift = exact.drift if role.group == "expert" and not role.key.endswith("_bias") else None
        if text := _difference(made.written, staged, name, drift):
            return f"{name} {text}"
    return None


def _difference(ours: Model, theirs: Model, name: str, drift: Drift | None) -> str | None:
    expected, found = ours.checkpoint.tensors[name], theirs.checkpoint.tensors[name]
    if expected.shape != found.shape:
        return f"has shape {list(found.shape)}, not {list(expected.shape)}"
    a, b = ours.checkpoint.read(name), theirs.checkpoint.read(name)
    if expected.dtype not in FLOAT_DTYPES or found.dtype not in FLOAT_DTYPES:
        return None if a == b else "differs from the source's in its bytes"
    relative, absolute = _ROUNDING[found.dtype]
    unlike = 0
    square = change = 0.0
    count = math.prod(expected.shape)
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        x, y = (_values(data, ref, start, stop) for data, ref in ((a, expected), (b, found)))
        if found.dtype == "F16":
            x, y = (np.clip(values, -_F16_LARGEST, _F16_LARGEST) for values in (x, y))
        gap = np.abs(y - x)
        unlike += int(np.count_nonzero(~(gap <= relative * np.abs(x) + absolute)))
        square += float(np.square(x, dtype=np.float64).sum())
        change += float(np.square(gap, dtype=np.float64).sum())
    share, rms = unlike / max(1, count), (change / square) ** 0.5 if square else float(change > 0)
    changed, limit = (drift.changed, drift.rms) if drift else (0.0, 0.0)
    if share > changed:
        return f"differs from what the source gives in {share:.1%} of its values ({changed:.1%} are allowed)"
    if drift and not rms <= limit + relative:
        return f"differs from what the source gives by {rms:.2f} of its RMS (up to {limit:.2f} is allowed)"
    return None


def _values(data: bytearray, ref: TensorRef, start: int, stop: int) -> np.ndarray:
    size = ref.nbytes // max(1, math.prod(ref.shape))
    return to_float32(memoryview(data)[start * size : stop * size], ref.dtype, (stop - start,))
