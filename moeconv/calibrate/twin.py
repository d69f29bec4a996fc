"""Statistics of one checkpoint for another of the same model: in another dtype, quantized, or before it was.

What both must have in common is a fingerprint of the structure, which calibrate writes into its files; the rows of the
routers, which hardly change, show whether the weights are those of one model too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from moeconv.checkpoint.header import FLOAT_DTYPES
from moeconv.checkpoint.strictjson import canonical_json
from moeconv.errors import InputError
from moeconv.families.meaning import meaning
from moeconv.families.model import Model
from moeconv.plan.kernels.arrays import to_float32

_ROUNDING = 0.05  # of the cosine of two router rows, between a model and its twin


def structure(model: Model) -> str | None:
    """Fingerprint (hex sha256) of what a model and its twin have in common: the family, what its settings mean, counts
    and widths, and which weights there are, whatever stores them. None where config.json says what no rule reads."""
    try:
        settings = meaning(model)
    except InputError:
        return None
    kinds = {(r.key, r.layer) for r in model.roles.values() if r.group != "expert" and r.key != "embedding.lm_head"}
    holds = {r.layer for r in model.roles.values() if r.group == "expert"}
    state = {
        "family": model.family.model_type,
        "settings": _plain(settings),
        "counts": [model.num_layers, model.num_experts, model.top_k, model.hidden_size, *model.moe_layers],
        "weights": sorted(f"{key} {layer}" for key, layer in kinds),
        "experts": sorted(map(str, holds)),
        "vocabulary": model.value("vocab_size"),
    }
    return hashlib.sha256(canonical_json(state)).hexdigest()


def _plain(value: Any) -> Any:
    """A setting as JSON, one spelling for equal values: 10000 and 10000.0, a tuple and a list."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return value if value is None or isinstance(value, bool) else str(value)


def measured_on(model: Model, metadata: Mapping[str, Any], *, label: str, what: str, twin: bool) -> str | None:
    """None where statistics (of `metadata`, in the file `label`) are of exactly this model, else the fingerprint of
    the twin that they are of. `what` tells people whose they are.

    Raises InputError for those of another model and, unless `twin` is asked for, for those of a twin.
    """
    if metadata["identity"] == model.identity:
        return None
    made_of = metadata.get("structure")
    alike = made_of is not None and made_of == structure(model)
    if not twin:
        hint = "Run `moeconv calibrate` on this model: any edit of a model changes its statistics."
        if alike:
            hint += " If they are of this very model in another dtype or quantization, pass --stats-of-twin."
        raise InputError(f"{label} holds statistics of another model ({what})", hint=hint)
    if made_of is None:
        raise InputError(
            f"--stats-of-twin: {label} does not say of what structure its model is",
            hint="It was written by an older version: run `moeconv calibrate` again, on the model or on its twin.",
        )
    if not alike:
        raise InputError(
            f"--stats-of-twin: {label} holds statistics of no twin of this model ({what})",
            hint="A twin has the same family, settings, layers and experts, in another dtype or quantization.",
        )
    return str(metadata["identity"])


def check_routers(model: Model, cosines: Mapping[int, np.ndarray], *, label: str) -> None:
    """Raises InputError where the cosines {layer: [E, E]} of a twin's router rows are not those of this model's.

    A router that is quantized, or has no matrix, says nothing.
    """
    for layer, theirs in cosines.items():
        ref = model.checkpoint.tensors.get(model.router_name(layer))
        if ref is None or ref.dtype not in FLOAT_DTYPES or ref.shape != (model.num_experts, model.hidden_size):
            continue
        rows: np.ndarray = to_float32(model.checkpoint.read(ref.name), ref.dtype, ref.shape).astype(np.float64)
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float64).tiny)
        apart = float(np.abs(rows @ rows.T - theirs).max())
        if not apart <= _ROUNDING:
            raise InputError(
                f"--stats-of-twin: {label} holds statistics of other weights: the router of layer {layer} differs by "
                f"{apart:.2f} in the cosine of two rows",
                hint="A twin is the same model in another dtype or quantization, not another training of it.",
            )
