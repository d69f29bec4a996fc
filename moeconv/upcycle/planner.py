"""plan_upcycle: a dense model and parameters in, a Plan out. Reads no tensor bytes and imports no torch."""

from __future__ import annotations

import math
from typing import Any

from moeconv.errors import InputError, UsageError
from moeconv.families.model import Model
from moeconv.families.moe import MOE
from moeconv.families.pairs import find_pair
from moeconv.families.spec import Family, Pair
from moeconv.families.target import draft_target
from moeconv.options import PlanOptions, UpcycleOptions, check_names, parameters_of, parse_layers, parse_size, take
from moeconv.plan.build import TORCH_NAMES, count_planned, parse_dtype
from moeconv.plan.plan import Plan, pack_shards
from moeconv.upcycle.layout import Assembly
from moeconv.upcycle.methods import METHODS


def plan_upcycle(model: Model, **parameters: Any) -> Plan:
    """Plan the conversion of a dense model; parameters are the fields of UpcycleOptions and PlanOptions.

    Raises UsageError for a wrong parameter, InputError where the target cannot represent the model exactly.
    """
    check_names(parameters, UpcycleOptions, PlanOptions)
    options, common = take(UpcycleOptions, parameters), take(PlanOptions, parameters)
    pair = find_pair(model.family, options.to)
    target = MOE[pair.target]
    _check(options, target)
    layers = parse_layers(options.layers, layers=model.num_layers)
    if not layers:
        raise UsageError("--layers names no layer")
    dtype = parse_dtype(common.dtype)
    draft = draft_target(model, pair)
    draft.config |= _sizes(model, target, options, layers)
    if dtype:
        draft.config.pop("torch_dtype", None)
        draft.config["dtype"] = TORCH_NAMES[dtype]
    assembly = Assembly(model, draft, options, frozenset(layers), dtype, common.seed)
    items = assembly.items()
    if assembly.rounded:
        draft.warnings.append(
            f"{', '.join(sorted(set(assembly.rounded)))}: what is folded into these weights is rounded to their dtype; "
            "--dtype float32 keeps it exact"
        )
    total, active = count_planned(items, top_k=options.top_k, num_experts=options.experts)
    return Plan(
        command="upcycle",
        parameters=parameters_of(options, common),
        identity=model.identity,
        config=draft.config,
        shards=pack_shards(items, shard_size=parse_size(common.shard_size, flag="--shard-size")),
        params_total=total,
        params_active=active,
        block=_block(model, pair, options, layers, exact=not assembly.rounded and dtype in (None, model.dtype, "F32")),
        warnings=(*model.checkpoint.warnings, *draft.warnings),
        dropped=(*model.dropped, *assembly.dropped),
        promise=assembly.promise(),
    )


def _block(
    model: Model, pair: Pair, options: UpcycleOptions, layers: tuple[int, ...], *, exact: bool
) -> dict[str, Any]:
    """The step's part of the JSON. `exact` promises float32 logits equal to rounding, and the run checks it."""
    return {
        "method": options.method,
        "from": pair.source,
        "to": pair.target,
        "num_experts": options.experts,
        "top_k": options.top_k,
        "moe_layers": list(layers),
        "exact": exact and METHODS[options.method].exact and pair.exact,
    }


def _check(options: UpcycleOptions, target: Family) -> None:
    if not 1 <= options.experts <= 4096:
        raise UsageError(f"--experts {options.experts} is outside 1 to 4096")
    if not 1 <= options.top_k <= options.experts:
        raise UsageError(
            f"--top-k {options.top_k} must be from 1 to the number of experts ({options.experts})",
            hint="Lower --top-k or raise --experts.",
        )
    fixed = target.routing.top_k if target.routing else None
    if fixed is not None and options.top_k != fixed:
        raise UsageError(f"--top-k {options.top_k}: {target.model_type} routes every token to {fixed} experts")
    for name in ("drop_ratio", "noise_fraction"):
        if not 0 <= getattr(options, name) <= 1:
            raise UsageError(f"--{name.replace('_', '-')} must be from 0 to 1")
    for name in ("router_std", "noise_scale"):
        if not (math.isfinite(getattr(options, name)) and getattr(options, name) >= 0):
            raise UsageError(f"--{name.replace('_', '-')} must be a finite number from 0 up")


def _sizes(model: Model, target: Family, options: UpcycleOptions, layers: tuple[int, ...]) -> dict[str, Any]:
    """Config keys that say how many experts there are, how wide, and in which layers."""
    sizes: dict[str, Any] = dict.fromkeys(target.num_experts, options.experts)
    sizes |= dict.fromkeys(target.top_k, options.top_k)
    if "intermediate_size" in target.config:
        sizes["intermediate_size"] = model.ffn_width
    sizes[target.expert_width] = model.ffn_width
    placed = target.placement.write(layers, model.num_layers)
    if placed is None:
        dense = next(i for i in range(model.num_layers) if i not in layers)
        can = "makes every layer a Mixture-of-Experts"
        raise InputError(
            f"{target.model_type} {can if target.placement.can == 'no layer' else 'leaves ' + target.placement.can}"
            f"{'' if target.placement.can == 'no layer' else ' dense'}; it cannot leave layer {dense} dense",
            hint="Convert all layers, or choose a target with dense layers (--to qwen2_moe for llama).",
        )
    return sizes | dict(placed)
