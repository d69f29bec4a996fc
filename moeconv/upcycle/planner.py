"""plan_upcycle: a dense model and parameters in, a Plan out. Reads no tensor bytes and imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from moeconv.checkpoint.overlay import provenance
from moeconv.checkpoint.reader import Checkpoint
from moeconv.checkpoint.safetensors_file import SafetensorsFile
from moeconv.errors import InputError, UsageError
from moeconv.families.folds import Draft
from moeconv.families.model import Model, open_model
from moeconv.families.node import fill
from moeconv.families.pairs import find_pair
from moeconv.families.registry import tables
from moeconv.families.spec import Family, Pair
from moeconv.families.target import draft_target
from moeconv.families.written import other_values_elsewhere, written_config
from moeconv.options import (
    EXPERTS,
    TOP_K,
    PlanOptions,
    UpcycleOptions,
    check_names,
    from_keywords,
    parameters_of,
    parse_layers,
)
from moeconv.plan.arrange import arrange
from moeconv.plan.build import TORCH_NAMES, count_planned, parse_dtype
from moeconv.plan.overlay import ORIGIN as OVERLAY
from moeconv.plan.overlay import fingerprint
from moeconv.plan.partition import Partition
from moeconv.plan.plan import Item, Plan
from moeconv.upcycle.cut import Cut, cut_ffn, grouped_config, shared_config
from moeconv.upcycle.duplicate import plan_duplicate
from moeconv.upcycle.layout import Assembly
from moeconv.upcycle.methods import METHODS, check_reads
from moeconv.upcycle.siblings import check_siblings
from moeconv.upcycle.sources import sibling_origin
from moeconv.upcycle.split import (
    SplitShape,
    check_partition,
    split_block,
    split_layers,
    split_options,
    split_parameters,
    split_shape,
)
from moeconv.upcycle.widths import check_widths

_TRIFLE = 0.03  # of the active parameters


def plan_upcycle(
    model: Model, *, siblings: Sequence[Model] = (), overlay: SafetensorsFile | None = None,
    partition: Partition | None = None, **parameters: Any,
) -> Plan:  # fmt: skip
    """Plan the conversion of a dense model, or more experts for one that has some; parameters are the
    fields of UpcycleOptions and PlanOptions.

    `siblings` are the opened checkpoints of `experts_from` (opened here when only their paths are given); run such a
    plan with `execute(origins=origins_of(siblings))`. `overlay` holds what was measured for `router`, under the origin
    "overlay", and `partition` what was measured for split, under the origin "partition" (its `file`); without them the
    plan has its final sizes, and cannot be run.

    Raises UsageError for a wrong parameter, InputError where the target cannot represent the model exactly.
    """
    check_names(parameters, UpcycleOptions, PlanOptions)
    options, common = from_keywords(UpcycleOptions, parameters), from_keywords(PlanOptions, parameters)
    return upcycle_plan(model, options, common, siblings=siblings, overlay=overlay, partition=partition)


def upcycle_plan(
    model: Model, options: UpcycleOptions, common: PlanOptions, *, siblings: Sequence[Model] = (),
    overlay: SafetensorsFile | None = None, partition: Partition | None = None,
) -> Plan:  # fmt: skip
    """`plan_upcycle` of options."""
    check_reads(options)
    if model.family.kind == "moe" and options.to in (None, model.family.model_type):
        return plan_duplicate(model, options, common)
    made_with = _made_with(model, overlay)
    if options.experts_from and not siblings:
        siblings = [open_model(path) for path in options.experts_from]
    options, told = _with_siblings(model, options, siblings)
    splits = METHODS[options.method].partition
    if splits:
        options = split_options(model, options)
    pair = find_pair(model.family, options.to, shared=options.shared_experts is not None)
    target = tables().moe[pair.target]
    cut = cut_ffn(model.ffn_width, granularity=_granularity(options), shared=options.shared_experts)
    cut = _counted(cut, options, len(siblings))
    options = replace(options, experts=cut.experts, top_k=cut.top_k)
    _check(options, target, cut)
    shape = _shape(model, options, partition) if splits else None
    layers = split_layers(model, options, partition) if splits else _layers(model, options)
    if not layers:
        raise UsageError("--layers names no layer")
    dtype = parse_dtype(common.dtype)
    if splits:
        _check_router_rows(options, target, dtype or model.dtype)
    draft = _draft(model, pair, options, cut, layers, dtype)
    draft.warnings += told + _size_warnings(model, options, target, cut, dtype or model.dtype)
    assembly = Assembly(model, draft, options, cut, frozenset(layers), dtype, common.seed, tuple(siblings))
    items = assembly.items()
    if assembly.rounded:
        draft.warnings.append(
            f"{', '.join(sorted(set(assembly.rounded)))}: what is folded into these weights is rounded to their dtype; "
            "--dtype float32 keeps it exact"
        )
    draft.warnings += other_values_elsewhere(target, draft.config)
    lossless = not assembly.rounded and dtype in (None, model.dtype, "F32")
    exact = lossless and (METHODS[options.method].exact or cut.idle)
    made = _parameters(options, common, siblings)
    made |= {"overlay": fingerprint(overlay), "made_with": made_with} if overlay else {}
    total, active = count_planned(items, target, layers=model.num_layers, top_k=cut.top_k, num_experts=cut.experts)
    draft.warnings += _idle_shared(items, target, cut, active)
    return Plan(
        command="upcycle",
        parameters=made | (split_parameters(partition) if shape else {}),
        identity=model.identity,
        config=written_config(target.config.write({}, draft.config), target),
        shards=arrange(items, common, target),
        params_total=total,
        params_active=active,
        block=_block(pair, options, cut, layers, exact=exact) | (split_block(partition, shape) if shape else {}),
        warnings=(*model.warnings, *draft.warnings),
        dropped=(*model.dropped, *assembly.dropped),
        promise=assembly.promise(),
    )


def _shape(model: Model, options: UpcycleOptions, partition: Partition | None) -> SplitShape:
    """The shape of a split; a partition that was measured for another is refused."""
    shape = split_shape(model, options)
    if partition:
        check_partition(model, options, partition, shape)
    return shape


def _check_router_rows(options: UpcycleOptions, target: Family, dtype: str) -> None:
    """Raises InputError where the rows of a router that splits an FFN would be zero in the dtype of the output."""
    if dtype == "F16" and "router.weight" not in target.tensors.float32:
        raise InputError(
            f"--method {options.method} writes router rows of {target.model_type} that float16 cannot hold "
            "(about 1e-6)",
            hint="Pass --dtype bfloat16 or float32.",
        )


def _draft(
    model: Model, pair: Pair, options: UpcycleOptions, cut: Cut, layers: tuple[int, ...], dtype: str | None
) -> Draft:
    """The target's config and tensors, with the sizes of the experts and the dtype in the config."""
    draft = draft_target(model, pair)
    draft.config |= _sizes(model, draft, options, cut, layers)
    if cut.idle and draft.target.experts.routed_norm:
        # with another weight the norm would scale up whatever experts of zero first learn to the size of the others
        draft.tensors[draft.target.experts.routed_norm] = fill(0.0)
    if dtype:
        draft.config.pop("torch_dtype", None)
        draft.config["dtype"] = TORCH_NAMES[dtype]
    return draft


def _size_warnings(model: Model, options: UpcycleOptions, target: Family, cut: Cut, dtype: str) -> list[str]:
    return check_widths(model, options, target, cut, dtype) + _ties(options, target, cut, dtype)


def origins_of(siblings: Sequence[Model]) -> dict[str, Checkpoint]:
    """The byte sources of a plan over siblings, as `execute` wants them."""
    return {sibling_origin(i): sibling.checkpoint for i, sibling in enumerate(siblings)}


def router_rows(plan: Plan) -> tuple[dict[int, str], int]:
    """(layer -> name, rows) of the router tensors that a plan takes from its overlay."""
    wanted: dict[int, str] = {}
    rows = 0
    for item in plan.items():
        for ref in item.inputs:
            if ref.origin == OVERLAY and item.outputs[0].role == "router.weight":
                layer = next(int(word) for word in ref.tensor.split(".") if word.isdecimal())
                wanted[layer] = ref.tensor
                rows = max(rows, ref.start // (ref.nbytes // ref.shape[0]) + ref.shape[0])
    return dict(sorted(wanted.items())), rows


def _with_siblings(
    model: Model, options: UpcycleOptions, siblings: Sequence[Model]
) -> tuple[UpcycleOptions, list[str]]:
    """The options with the method that siblings mean, and warnings about them."""
    method = METHODS[options.method]
    if method.siblings == "must" and not siblings:
        raise UsageError(
            f"--method {options.method} needs the siblings",
            hint="Name each one: --experts-from DIR1 --experts-from DIR2.",
        )
    if not siblings:
        return options, []
    if method.siblings == "no" or options.shared_experts == "full":
        word = "--shared-experts full" if options.shared_experts == "full" else f"--method {options.method}"
        raise UsageError(f"--experts-from does not go with {word}", hint="Leave one of the two out.")
    warnings = check_siblings(model, siblings)
    return replace(options, method=method.with_siblings or options.method), warnings


def _counted(cut: Cut, options: UpcycleOptions, siblings: int) -> Cut:
    """The cut with the numbers of experts: the defaults, or one per sibling, in whole copies, where nothing is said."""
    experts, top_k = options.experts, options.top_k
    if experts is None:
        experts = cut.pieces * (siblings or -(-EXPERTS // cut.pieces))
    if siblings and experts % (siblings * cut.pieces):
        raise UsageError(
            f"--experts {experts}: {siblings} siblings make {siblings * cut.pieces} experts, or a multiple of that",
            hint="Leave --experts out.",
        )
    if top_k is None:
        top_k = min(experts, cut.pieces * -(-TOP_K // cut.pieces))
    return replace(cut, experts=experts, top_k=top_k)


def _parameters(options: UpcycleOptions, common: PlanOptions, siblings: Sequence[Model]) -> dict[str, Any]:
    """What the plan's id depends on: siblings by their fingerprints, not by their paths."""
    return parameters_of(options, common) | {"experts_from": [sibling.identity for sibling in siblings]}


def _made_with(model: Model, overlay: SafetensorsFile | None) -> dict[str, Any] | None:
    if overlay is None:
        return None
    return provenance(
        overlay, identity=model.identity, checkpoint=model.checkpoint, hint="Measure it again on this one."
    )


def _layers(model: Model, options: UpcycleOptions) -> tuple[int, ...]:
    return model.with_ffn(parse_layers(options.layers, layers=model.num_layers), every=options.layers == "all")


def _granularity(options: UpcycleOptions) -> int:
    return METHODS[options.method].granularity if options.granularity is None else options.granularity


def _block(pair: Pair, options: UpcycleOptions, cut: Cut, layers: tuple[int, ...], *, exact: bool) -> dict[str, Any]:
    """The step's part of the JSON. `exact` promises float32 logits equal to rounding, and the run checks it."""
    return {
        "method": options.method,
        "from": pair.source,
        "to": pair.target,
        "num_experts": cut.experts,
        "top_k": cut.top_k,
        "moe_layers": list(layers),
        "expert_width": cut.width,
        "shared_width": cut.shared,
        "granularity": cut.pieces,
        "exact": exact,
    }


def _ties(options: UpcycleOptions, target: Family, cut: Cut, dtype: str) -> list[str]:
    """Virtual groups fall apart where another copy's logit is equal after rounding: 0.3 to 0.8 % of tokens."""
    rule = target.experts.routing
    if cut.pieces == 1 or not METHODS[options.method].grouped or cut.experts == cut.top_k or rule is None:
        return []
    if rule.float32 or rule.groups or dtype not in ("BF16", "F16"):
        return []
    return [
        f"{target.model_type} rounds its router's logits to {TORCH_NAMES[dtype]}: where two copies' logits become "
        "equal, a token may get pieces of both (0.3 to 0.8 % of tokens in bfloat16); "
        "with glm4_moe, dots1 and deepseek_v3 that cannot happen"
    ]


def _idle_shared(items: Sequence[Item], target: Family, cut: Cut, active: int) -> list[str]:
    """A shared expert of zeros that the family cannot be without, where it is more than a trifle."""
    zeros = sum(spec.params for item in items for spec in item.outputs if spec.role.startswith("shared."))
    if cut.shared or zeros < _TRIFLE * active:
        return []
    return [
        f"{target.model_type} cannot be without a shared expert as wide as a routed one: {zeros:,} parameters of zero, "
        f"{zeros / active:.0%} of those that every token computes; --method granular --granularity 8 makes it an "
        "eighth as wide, and with --shared-experts 1 it holds a piece of the FFN instead"
    ]


def _check_cut(options: UpcycleOptions, target: Family, cut: Cut) -> None:
    if cut.pieces == 1:
        return
    if target.experts.routing and not target.experts.routing.equal:
        raise InputError(
            f"{target.model_type} gives experts with equal logits unequal weights, so the pieces of a copy do not add "
            "up",
            hint="See `moeconv families` for other targets (--to), or leave --granularity out.",
        )
    for flag, value in (("--experts", cut.experts), ("--top-k", cut.top_k)):
        if METHODS[options.method].grouped and value % cut.pieces:
            more = -(-value // cut.pieces) * cut.pieces
            raise UsageError(
                f"{flag} {value} must be a multiple of the {cut.pieces} pieces that make up the routed FFN",
                hint=f"Try {flag} {more}.",
            )
    if cut.experts % cut.pieces:
        raise UsageError(f"--experts {cut.experts} must be a multiple of the {cut.pieces} pieces of a copy")


def _check(options: UpcycleOptions, target: Family, cut: Cut) -> None:
    if not 1 <= cut.experts <= 4096:
        raise UsageError(f"--experts {cut.experts} is outside 1 to 4096")
    if not 1 <= cut.top_k <= cut.experts:
        raise UsageError(
            f"--top-k {cut.top_k} must be from 1 to the number of experts ({cut.experts})",
            hint="Lower --top-k or raise --experts.",
        )
    _check_cut(options, target, cut)
    fixed = target.experts.routing.top_k if target.experts.routing else None
    if fixed is not None and cut.top_k != fixed:
        raise UsageError(f"--top-k {cut.top_k}: {target.model_type} routes every token to {fixed} experts")
    for name in ("drop_ratio", "noise_fraction"):
        if not 0 <= getattr(options, name) <= 1:
            raise UsageError(f"--{name.replace('_', '-')} must be from 0 to 1")
    for name in ("router_std", "noise_scale"):
        if not (math.isfinite(getattr(options, name)) and getattr(options, name) >= 0):
            raise UsageError(f"--{name.replace('_', '-')} must be a finite number from 0 up")


def _sizes(model: Model, draft: Draft, options: UpcycleOptions, cut: Cut, layers: tuple[int, ...]) -> dict[str, Any]:
    """Config keys that say how many experts there are, how wide, and in which layers."""
    target = draft.target
    sizes: dict[str, Any] = dict.fromkeys(target.experts.count, cut.experts)
    sizes |= dict.fromkeys(target.experts.top_k, cut.top_k)
    if target.experts.dense_width in target.config.defaults:
        sizes[target.experts.dense_width] = model.ffn_width
    sizes[target.experts.width] = cut.width
    sizes |= shared_config(target, cut)
    method, rule = METHODS[options.method], target.experts.routing
    if method.grouped:
        sizes |= grouped_config(target, cut)
    if rule and rule.scaling:
        sizes[rule.scaling] = float(method.scale(cut, options))
    placed = target.experts.placement.write(layers, model.num_layers, draft.config.get)
    if placed is None:
        dense = next(i for i in range(model.num_layers) if i not in layers)
        can = target.experts.placement.can
        does = "makes every layer a Mixture-of-Experts" if can == "no layer" else f"leaves {can} dense"
        raise InputError(
            f"{target.model_type} {does}; it cannot leave layer {dense} dense",
            hint="Convert all layers, or choose a target with dense layers (--to qwen2_moe for llama).",
        )
    return sizes | dict(placed)
