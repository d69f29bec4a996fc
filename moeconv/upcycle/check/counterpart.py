"""Is an inexact upcycle its exact counterpart, up to rounding and to what its method may change?

The counterpart (upcycle/counterpart.py) is made in memory, a tensor at a time, under the config.json that was written:
what it computes shows damage to config, what its tensors are shows damage to tensors.
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
from moeconv.families.model import Model, open_model
from moeconv.plan.flow import ByteSource
from moeconv.plan.kernels.arrays import to_float32
from moeconv.plan.partition import ORIGIN as PARTITION
from moeconv.plan.partition import load_partition
from moeconv.plan.planned import planned_model
from moeconv.upcycle.counterpart import Counterpart, Drift
from moeconv.upcycle.planner import origins_of, plan_upcycle

# relative and absolute distance of a value to the float32 one that it was rounded from: twice half an ulp
_ROUNDING = {"BF16": (2.0**-8, 1e-38), "F16": (2.0**-10, 1e-7), "F32": (1e-6, 1e-37), "F64": (1e-6, 1e-37)}
_F16_LARGEST = 5.9e4  # beyond, planners clip
_BLOCK = 1 << 22  # values that are compared at a time


@dataclass(frozen=True)
class Made:
    """The counterpart that is run, and the one whose tensors the written model must have: the same, but with siblings'
    FFNs where experts are made of those."""

    run: Model
    written: Model


def make_counterpart(
    source: Model, staged: Model, said: Counterpart, folder: Path, *, siblings: Sequence[str] = (),
    partition: str | None = None,
) -> Made:  # fmt: skip
    """The counterpart's models; `folder` gets the config.json that transformers builds the class from."""
    measured = load_partition(partition) if partition else None
    origins: dict[str, ByteSource] = {"source": source.checkpoint}
    if measured is not None:
        origins[PARTITION] = measured.file
    plan = plan_upcycle(source, partition=measured, **said.parameters)
    config = dict(staged.checkpoint.config)
    for key in {*plan.config, *said.config}:
        if plan.config.get(key) != said.config.get(key):
            config.pop(key, None)
            config |= {key: plan.config[key]} if key in plan.config else {}
    plan = replace(plan, config=config)
    (folder / "config.json").write_text(json.dumps(config))
    run = planned_model(plan, companions=folder, origins=origins)
    if not said.siblings:
        return Made(run, run)
    opened = [open_model(path) for path in siblings]
    other = plan_upcycle(source, siblings=opened, **said.parameters)
    return Made(run, planned_model(other, companions=folder, origins=origins | origins_of(opened)))


def first_difference(made: Made, staged: Model, said: Counterpart) -> str | None:
    """The first tensor of the written model that is not the counterpart's, with what differs; None when all are."""
    for name, role in made.written.roles.items():
        theirs = staged.checkpoint.tensors.get(name)
        if theirs is None:
            return f"{name} is missing"
        if role.group == "router" and said.measured:
            continue
        drift = said.drift if role.group == "expert" and not role.key.endswith("_bias") else None
        if text := _difference(made.written, staged, name, drift):
            return f"{name} {text}"
    return None


def _difference(ours: Model, theirs: Model, name: str, drift: Drift | None) -> str | None:
    expected, found = ours.checkpoint.tensors[name], theirs.checkpoint.tensors[name]
    if expected.shape != found.shape:
        return f"has shape {list(found.shape)}, not {list(expected.shape)}"
    a, b = ours.checkpoint.read(name), theirs.checkpoint.read(name)
    if expected.dtype not in FLOAT_DTYPES or found.dtype not in FLOAT_DTYPES:
        return None if a == b else "has other bytes than the source's"
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
        return f"differs in {share:.1%} of its values from what the source gives ({changed:.1%} may)"
    if drift and not rms <= limit + relative:
        return f"differs by {rms:.2f} of its RMS from what the source gives (up to {limit:.2f} may)"
    return None


def _values(data: bytearray, ref: TensorRef, start: int, stop: int) -> np.ndarray:
    size = ref.nbytes // max(1, math.prod(ref.shape))
    return to_float32(memoryview(data)[start * size : stop * size], ref.dtype, (stop - start,))
