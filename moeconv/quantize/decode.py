"""The plan that decodes a quantized checkpoint to floats. Imports no torch and reads no tensor bytes."""

from __future__ import annotations

import math

from moeconv.families import packed
from moeconv.families.head import head_warnings, with_head
from moeconv.families.model import Model
from moeconv.families.written import written_config
from moeconv.options import PlanOptions, parameters_of
from moeconv.plan.arrange import arrange
from moeconv.plan.build import TORCH_NAMES, carry, count_planned, whole
from moeconv.plan.plan import Item, Plan, TensorSpec


def plan_decode(model: Model) -> Plan:
    """Plan to decode every stored weight to bfloat16, or to the model's own 16-bit dtype, and to remove the
    quantization from config.json.

    The shapes follow from config.json; opening the model has compared the stored parts with them.
    """
    dtype = model.dtype if model.dtype in ("BF16", "F16") else "BF16"
    items: list[Item] = []
    done: set[str] = set()
    for name, role in model.roles.items():
        weight = packed.weight_of(name)
        if not role.part:
            ref = model.checkpoint.tensors[name]
            items.append(carry(ref, role=role.key, params=model.numel(ref)))
        elif weight not in done:
            done.add(weight)
            items.append(_decoded(model, weight, role.key, dtype))
    config = packed.with_quantization(with_head(model), lambda _: None)
    total, active = count_planned(
        items, model.family, layers=model.num_layers, top_k=model.top_k, num_experts=model.num_experts
    )
    common = PlanOptions()
    return Plan(
        command="decode",
        parameters=parameters_of(common),
        identity=model.identity,
        config=written_config(config, model.family, dtype=TORCH_NAMES[dtype]),
        shards=arrange(items, common, model.family),
        params_total=total,
        params_active=active,
        warnings=(*model.warnings, *head_warnings(model)),
        dropped=model.dropped,
    )


def _decoded(model: Model, name: str, key: str, dtype: str) -> Item:
    stored = model.stored[name]
    spec = TensorSpec(name, dtype, stored.shape, key, math.prod(stored.shape))
    inputs = tuple(whole(model.checkpoint.tensors[tensor]) for tensor in stored.parts.values())
    params = {
        "parts": list(stored.parts),
        "how": stored.how,
        # the parts of a tensor of all experts that have no entry per expert
        "shared": [part in packed.SHARED for part in stored.parts],
    }
    return Item((spec,), "decode", inputs, params, key.partition(".")[0])
