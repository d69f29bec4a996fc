"""Describes a checkpoint from its headers and config alone: sizes, experts, dtypes, quantization. No torch."""

from __future__ import annotations

import os

from moeconv.contract import Inspected, Quantization
from moeconv.families import packed
from moeconv.families.head import head_warnings
from moeconv.families.methods import quantization_method
from moeconv.families.model import Model, open_model
from moeconv.plan.build import PREDICTION, active_of, groups_of


def inspect(model: Model | str | os.PathLike[str]) -> Inspected:
    """The JSON object of `moeconv inspect`, of a model or of the directory that contains it.

    `flops_per_token` is 2 per active parameter; it leaves out the input embedding, which is a lookup, and the part of
    attention that grows with the context. The active parameters include the input embedding. Multi-token-prediction
    layers are counted apart. Raises InputError for a directory that `open_model` refuses."""
    if isinstance(model, str | os.PathLike):
        model = open_model(model)
    refs, roles = model.checkpoint.tensors, model.roles
    dtypes: dict[str, int] = {}
    by_role: dict[str, int] = {}
    bytes_by_role: dict[str, int] = {}
    for ref in refs.values():
        dtypes[ref.dtype] = dtypes.get(ref.dtype, 0) + ref.nbytes
    for ref, group in groups_of(model):
        by_role[group] = by_role.get(group, 0) + model.numel(ref)
        bytes_by_role[group] = bytes_by_role.get(group, 0) + ref.nbytes
    lookup = sum(model.numel(refs[name]) for name, role in roles.items() if role.key == "embedding.tokens")
    total, active = active_of(by_role, top_k=model.top_k, num_experts=model.num_experts)
    tied = not any(role.key == "embedding.lm_head" for role in model.roles.values())
    return {
        "path": str(model.checkpoint.path),
        "model_type": model.family.model_type,
        "kind": model.family.kind,
        "architecture": model.family.architecture,
        "layers": model.num_layers,
        "moe_layers": list(model.moe_layers),
        "mtp_layers": list(model.prediction_layers),
        "num_experts": model.num_experts,
        "top_k": model.top_k,
        "shared_experts": int(by_role.get("shared", 0) > 0),
        "parameters": {
            "total": total,
            "active": active,
            "experts": by_role.get("expert", 0),
            "router": by_role.get("router", 0),
            "prediction": by_role.get(PREDICTION, 0),
        },
        "parameters_by_role": dict(sorted(by_role.items())),
        "bytes_by_role": dict(sorted(bytes_by_role.items())),
        "bytes": model.checkpoint.nbytes,
        "dtypes": dict(sorted(dtypes.items())),
        "flops_per_token": 2 * (active if tied else active - lookup),
        "quantization": _quantization(model),
        "tensors": len(refs),
        "shards": len(model.checkpoint.shards),
        "identity": model.identity,
        "warnings": [*model.warnings, *head_warnings(model, writes=False)],
    }


def _quantization(model: Model) -> Quantization | None:
    """How the weights are packed; None for an unquantized model."""
    value = model.quantization
    if value is None:
        return None
    ours = value.get("moeconv")
    return {
        "format": quantization_method(value),
        "bits": packed.bits_of(model.checkpoint.config),
        "scheme": ours.get("scheme") if isinstance(ours, dict) else None,
        "roles": sorted({role.group for role in model.roles.values() if role.part}),
    }
