"""plan_decode: a quantized checkpoint in, the Plan of the same model in plain numbers out. No torch, no bytes."""

from __future__ import annotations

import math

from moeconv.checkpoint.companions import without_code
from moeconv.checkpoint.reader import TensorRef
from moeconv.errors import InputError, escape
from moeconv.families import packed
from moeconv.families.head import said_head, with_head
from moeconv.families.model import Model
from moeconv.families.written import written_config
from moeconv.options import PlanOptions, parameters_of, take
from moeconv.plan.arrange import arrange
from moeconv.plan.build import TORCH_NAMES, carry, count_planned, whole
from moeconv.plan.plan import Item, Plan, TensorSpec

_FLOAT8 = ("F8_E4M3", "F8_E5M2")


def plan_decode(model: Model) -> Plan:
    """Every stored weight decoded to bfloat16 (or the model's own 16-bit dtype), config.json without its quantization.

    Raises InputError for a packing whose shape the headers do not tell.
    """
    dtype = model.dtype if model.dtype in ("BF16", "F16") else "BF16"
    parts: dict[str, list[TensorRef]] = {}
    items: list[Item] = []
    for name, role in model.roles.items():
        if role.part:
            parts.setdefault(packed.weight_of(name), []).append(model.checkpoint.tensors[name])
    for name, role in model.roles.items():
        ref = model.checkpoint.tensors[name]
        weight = packed.weight_of(name)
        if not role.part:
            items.append(carry(ref, role=role.key, params=model.numel(ref)))
        elif parts[weight][0] is ref:
            items.append(_decoded(weight, parts[weight], role.key, dtype))
    config, _ = without_code({k: v for k, v in with_head(model).items() if k != "quantization_config"})
    total, active = count_planned(
        items, model.family, layers=model.num_layers, top_k=model.top_k, num_experts=model.num_experts
    )
    common = take(PlanOptions, {})
    return Plan(
        command="decode",
        parameters=parameters_of(common),
        identity=model.identity,
        config=written_config(config, model.family, dtype=TORCH_NAMES[dtype]),
        shards=arrange(items, common, model.family),
        params_total=total,
        params_active=active,
        warnings=(*model.warnings, *said_head(model)),
        dropped=model.dropped,
    )


def _decoded(name: str, refs: list[TensorRef], key: str, dtype: str) -> Item:
    shape = _shape(name, {packed.suffix_of(ref.name): ref for ref in refs})
    spec = TensorSpec(name, dtype, shape, key, math.prod(shape))
    params = {
        "parts": [packed.suffix_of(ref.name) for ref in refs],
        # of a tensor of all experts: the parts that have no entry for each of them
        "shared": [(packed.split_part(ref.name) or ("", ""))[1] in packed.SHARED for ref in refs],
    }
    return Item((spec,), "decode", tuple(whole(ref) for ref in refs), params, key.partition(".")[0])


def _shape(name: str, parts: dict[str, TensorRef]) -> tuple[int, ...]:
    """The weight's shape, where the headers tell it."""
    if "_blocks" in parts and len(parts["_blocks"].shape) == 4:
        experts, out, groups, width = parts["_blocks"].shape
        return (experts, groups * width * 2, out)
    codes = parts.get(".weight", parts.get(""))
    if codes is not None and (".weight.scb" in parts or ".scb" in parts):
        return codes.shape
    if codes is not None and (codes.dtype in _FLOAT8 or ".SCB" in parts):
        return codes.shape
    if ".weight_packed" in parts and ".weight_scale" in parts:
        raise InputError(
            f"{escape(name)} is packed in integers, whose width its headers do not tell",
            hint="Quantize the checkpoint that it was made from.",
        )
    raise InputError(
        f"{escape(name)} is packed in a way that its headers do not tell the shape of",
        hint="Quantize the checkpoint that it was made from.",
    )
