"""plan_upcycle: a dense model and parameters in, a Plan out. Reads no tensor bytes and imports no torch."""

from __future__ import annotations

import math
from typing import Any

from moeconv.checkpoint.header import FLOAT_DTYPES
from moeconv.errors import InputError, UsageError, escape
from moeconv.families.model import Model
from moeconv.families.moe import MOE
from moeconv.families.pairs import find_pair, target_config
from moeconv.families.spec import FFN_PARTS, Family, Pair, Role
from moeconv.options import PlanOptions, UpcycleOptions, check_names, parameters_of, parse_layers, parse_size, take
from moeconv.plan.build import TORCH_NAMES, carry, count_planned, parse_dtype
from moeconv.plan.plan import Item, Plan, TensorSpec, pack_shards
from moeconv.upcycle.methods import METHODS, Matrix


def plan_upcycle(model: Model, **parameters: Any) -> Plan:
    """Plan the conversion of a dense model; parameters are the fields of UpcycleOptions and PlanOptions.

    Raises UsageError for a wrong parameter, InputError where the target cannot represent the model exactly.
    """
    check_names(parameters, UpcycleOptions, PlanOptions)
    options, common = take(UpcycleOptions, parameters), take(PlanOptions, parameters)
    pair = find_pair(model.family, options.to)
    target = MOE[pair.target]
    _check(options)
    layers = parse_layers(options.layers, layers=model.num_layers)
    config, warnings = _config(model, pair, target, options, layers, common)
    items = _items(model, pair, target, options, layers, common)
    total, active = count_planned(items, top_k=options.top_k, num_experts=options.experts)
    method = METHODS[options.method]
    dtype = parse_dtype(common.dtype)
    block = {
        "method": options.method,
        "from": pair.source,
        "to": pair.target,
        "num_experts": options.experts,
        "top_k": options.top_k,
        "moe_layers": list(layers),
        "exact": method.exact and pair.exact and dtype in (None, model.dtype),
    }
    return Plan(
        command="upcycle",
        parameters=parameters_of(options, common),
        identity=model.identity,
        config=config,
        shards=pack_shards(items, shard_size=parse_size(common.shard_size, flag="--shard-size")),
        params_total=total,
        params_active=active,
        block=block,
        warnings=(*model.checkpoint.warnings, *warnings),
        dropped=model.dropped,
        promise=_promise(pair, options.experts, len(layers)),
    )


def _check(options: UpcycleOptions) -> None:
    if not 1 <= options.experts <= 4096:
        raise UsageError(f"--experts {options.experts} is outside 1 to 4096")
    if not 1 <= options.top_k <= options.experts:
        raise UsageError(
            f"--top-k {options.top_k} must be from 1 to the number of experts ({options.experts})",
            hint="Lower --top-k or raise --experts.",
        )
    for name in ("drop_ratio", "noise_fraction"):
        if not 0 <= getattr(options, name) <= 1:
            raise UsageError(f"--{name.replace('_', '-')} must be from 0 to 1")
    for name in ("router_std", "noise_scale"):
        if not (math.isfinite(getattr(options, name)) and getattr(options, name) >= 0):
            raise UsageError(f"--{name.replace('_', '-')} must be a finite number from 0 up")


def _config(
    model: Model, pair: Pair, target: Family, options: UpcycleOptions, layers: tuple[int, ...], common: PlanOptions
) -> tuple[dict[str, Any], list[str]]:
    config, warnings = target_config(pair, model.config, layers=model.num_layers)
    width = model.value("intermediate_size")
    config |= dict.fromkeys(target.num_experts, options.experts) | dict.fromkeys(target.top_k, options.top_k)
    config[target.expert_width] = width
    if pair.inert_shared_expert:
        config["shared_expert_intermediate_size"] = pair.inert_shared_expert
    dense = [i for i in range(model.num_layers) if i not in layers]
    if not layers:
        raise UsageError("--layers names no layer")
    if target.dense_layers:
        config[target.dense_layers] = dense
    elif dense:
        raise InputError(
            f"{target.model_type} makes every layer a Mixture-of-Experts; it cannot leave layer {dense[0]} dense",
            hint="Convert all layers, or choose a target with dense layers (--to qwen2_moe for llama).",
        )
    dtype = parse_dtype(common.dtype)
    if dtype:
        config.pop("torch_dtype", None)
        config["dtype"] = TORCH_NAMES[dtype]
    return config, warnings


def _items(
    model: Model, pair: Pair, target: Family, options: UpcycleOptions, layers: tuple[int, ...], common: PlanOptions
) -> list[Item]:
    """Items in the source's file order, an FFN matrix followed by all experts' copies of it."""
    dtype, method, chosen = parse_dtype(common.dtype), METHODS[options.method], set(layers)
    items: list[Item] = []
    for name, ref in model.checkpoint.tensors.items():
        role = model.roles.get(name)
        if role is None:
            continue
        group, _, part = role.key.partition(".")
        if group == "ffn" and role.layer in chosen and part in FFN_PARTS:
            if ref.dtype not in FLOAT_DTYPES:
                raise InputError(
                    f"tensor {escape(name)!r} is {ref.dtype}: experts are made of {', '.join(FLOAT_DTYPES)} weights",
                    hint="Upcycle the unquantized checkpoint, then `moeconv quantize`.",
                )
            if part == "gate":
                items += _routing(model, pair, target, options, role.layer, dtype or ref.dtype, common.seed)
            for expert in range(options.experts):
                made = Role(f"expert.{part}", role.layer, expert)
                out = target.name(made.key, layer=role.layer, expert=expert)
                items.append(method.make(Matrix(ref, made, out, dtype, common.seed), options))
        elif target.has(role.key):
            items.append(carry(ref, role=role.key, name=target.name(role.key, layer=role.layer), dtype=dtype))
        else:
            raise InputError(
                f"{pair.target} has no place for tensor {escape(name)!r} ({role.key}) of {pair.source}",
                hint="See `moeconv families` for other targets (--to).",
            )
    return items


def _routing(
    model: Model, pair: Pair, target: Family, options: UpcycleOptions, layer: int | None, dtype: str, seed: int
) -> list[Item]:
    """A layer's new tensors: the router's random rows, and a zero shared expert where the target must have one."""
    hidden = model.hidden_size
    router = _new(target, "router.weight", layer, dtype, (options.experts, hidden))
    items = [Item((router,), "draw_normal", (), {"key": [seed, "router", layer], "std": options.router_std}, "router")]
    if width := pair.inert_shared_expert:
        shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width), "router": (1, hidden)}
        for part, shape in shapes.items():
            items.append(
                Item((_new(target, f"shared.{part}", layer, dtype, shape),), "fill", (), {"value": 0}, "shared")
            )
    return items


def _new(target: Family, key: str, layer: int | None, dtype: str, shape: tuple[int, int]) -> TensorSpec:
    return TensorSpec(target.name(key, layer=layer), dtype, shape, key, shape[0] * shape[1])


def _promise(pair: Pair, experts: int, layers: int) -> dict[str, int]:
    promise = {"router": layers, "expert": layers * experts * len(FFN_PARTS)}
    return promise | ({"shared": 4 * layers} if pair.inert_shared_expert else {})
