"""The plan that writes the experts of a model in a new order. Imports no torch and reads no tensor bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moeconv.errors import InputError, UsageError
from moeconv.families.head import head_warnings
from moeconv.families.model import Model
from moeconv.options import PlanOptions
from moeconv.plan.arrange import arrange as in_shards
from moeconv.plan.build import count_planned, parse_dtype
from moeconv.plan.plan import Plan
from moeconv.prune.cutting import pruned_items
from moeconv.prune.named_modules import check_renumbering
from moeconv.prune.planner import pruned_config, pruned_promise
from moeconv.types import Config


def check_arrangement(model: Model, common: PlanOptions) -> None:
    """Raises InputError for a model without experts, UsageError for options that cannot be used with it."""
    if model.family.kind != "moe" or not model.moe_layers:
        raise InputError(
            f"{model.family.model_type} has no experts to arrange", hint="Give a Mixture-of-Experts model."
        )
    if model.quantization is not None:
        if common.dtype:
            raise UsageError(
                "--dtype cannot cast a quantized source",
                hint="Leave out --dtype: codes and scales stay as they are stored.",
            )
        check_renumbering(model, model.quantization)


def plan_arrangement(
    model: Model, order: Mapping[int, Sequence[int]], common: PlanOptions, *, parameters: Config, block: Config
) -> Plan:
    """Plan a model whose experts have the order {layer: old numbers in their new order}. Layers without an entry keep
    theirs. Every tensor has the bytes of the source; only rows, names and numbers in config.json change."""
    stays = range(model.num_experts)
    whole = {layer: list(order.get(layer, stays)) for layer in (*model.moe_layers, *model.mtp_layers)}
    dtype = parse_dtype(common.dtype)
    items = pruned_items(model, whole, dtype)
    total, active = count_planned(
        items, model.family, layers=model.num_layers, top_k=model.top_k, num_experts=model.num_experts
    )
    return Plan(
        command="arrange",
        parameters=parameters,
        identity=model.identity,
        config=pruned_config(model, whole, dtype),
        shards=in_shards(items, common, model.family),
        params_total=total,
        params_active=active,
        block=block,
        warnings=(*model.warnings, *head_warnings(model)),
        dropped=model.dropped,
        promise=pruned_promise(model, whole),
    )
