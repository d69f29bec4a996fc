"""Decides whether statistics of one checkpoint can be used for another of the same model: its twin.

A twin has another dtype, or is quantized or not quantized. Both must have the same fingerprint of the structure, which
`calibrate` writes into its files. The rows of the routers, which another dtype hardly changes, show whether the weights
are those of the same model too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from moeconv.checkpoint.header import FLOAT_DTYPES
from moeconv.checkpoint.strictjson import canonical_json
from moeconv.errors import InputError
from moeconv.families.meaning import meaning
from moeconv.families.model import Model
from moeconv.plan.kernels.arrays import to_float32
from moeconv.types import Config

_ROUNDING = 0.05  # the largest difference of the cosine of two router rows between twins


def structure(model: Model) -> str | None:
    """The fingerprint (hex sha256) of everything that a model and its twin have in common: the family, the meaning of
    its settings, counts and widths, and its weights by role, however they are stored. None if config.json has a setting
    that moeconv cannot interpret."""
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


def _plain(value: object) -> object:
    """A setting as JSON, with one form for equal values (10000 and 10000.0, a tuple and a list)."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return value if value is None or isinstance(value, bool) else str(value)


def measured_on(model: Model, metadata: Config, *, label: str, what: str, twin: bool) -> str | None:
    """None if the statistics in the file `label`, with this `metadata`, were measured on exactly this model; otherwise
    the fingerprint of the twin that they were measured on. `what` describes the measured model in messages.

    Raises InputError for statistics of another model and, unless `twin` is set, for those of a twin.
    """
    if metadata["identity"] == model.identity:
        return None
    made_of = metadata.get("structure")
    alike = made_of is not None and made_of == structure(model)
    if not twin:
        hint = "Run `moeconv calibrate` on this model, because any edit of a model changes its statistics."
        if alike:
            hint += " If it is the same model in another dtype or quantization, pass --stats-of-twin."
        raise InputError(f"{label} holds statistics of another model ({what})", hint=hint)
    if made_of is None:
        raise InputError(
            f"--stats-of-twin: {label} does not record the structure of its model",
            hint="An older version wrote it: run `moeconv calibrate` again, on the model or on its twin.",
        )
    if not alike:
        raise InputError(
            f"--stats-of-twin: the statistics in {label} are not of a twin of this model ({what})",
            hint="A twin has the same family, settings, layers and experts, in another dtype or quantization.",
        )
    return str(metadata["identity"])


def check_routers(model: Model, cosines: Mapping[int, np.ndarray], *, label: str) -> None:
    """Raises InputError if the cosines {layer: [E, E]} of the router rows of a twin are not those of this model.

    Routers that are quantized or have no matrix are not compared.
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
                f"--stats-of-twin: the statistics in {label} are of other weights: the cosine of two router rows of "
                f"layer "
                f"{layer} differs by {apart:.2f}",
                hint="A twin is the same model in another dtype or quantization, not another training of it.",
            )
