"""The plan of an upcycle, from a model's headers and the options. Reads no tensor bytes and imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moeconv.checkpoint.overlay import provenance
from moeconv.checkpoint.safetensors_file import SafetensorsFile
from moeconv.contract import UpcycleBlock
from moeconv.errors import InputError, UsageError
from moeconv.families.folds import Draft
from moeconv.families.model import Model
from moeconv.families.node import fill
from moeconv.families.pairs import find_conversion
from moeconv.families.spec import Family, Pair
from moeconv.families.target import draft_target, whole_config
from moeconv.families.written import other_values_elsewhere
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
from moeconv.plan.flow import ByteSource
from moeconv.plan.overlay import ORIGIN as OVERLAY
from moeconv.plan.overlay import fingerprint
from moeconv.plan.partition import Partition
from moeconv.plan.plan import Item, Plan
from moeconv.types import JsonObject
from moeconv.units import counted
from moeconv.upcycle.added import Added, plan_added
from moeconv.upcycle.added_sources import open_added
from moeconv.upcycle.cut import Cut, cut_ffn, grouped_config, shared_config
from moeconv.upcycle.duplicate import NEWER, plan_duplicate
from moeconv.upcycle.kept_top_k import Copies, check_extends, plan_kept_top_k
from moeconv.upcycle.layout import Assembly
from moeconv.upcycle.limits import check_numbers, check_router_rows
from moeconv.upcycle.methods import METHODS, check_reads
from moeconv.upcycle.siblings import Sibling, bytes_of, check_siblings, open_siblings
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

_LATER = ("text_only", "ffn_only", *NEWER)  # flags that are newer than the ids of plans
_NEGLIGIBLE = 0.03  # share of the active parameters that is not worth a warning


def plan_upcycle(
    model: Model, *, siblings: Sequence[Sibling] = (), overlay: SafetensorsFile | None = None,
    partition: Partition | None = None, copies: Copies | None = None,
    added: Sequence[Added] = (), **parameters: object,
) -> Plan:  # fmt: skip
    """Plan the conversion of a dense model, or the duplication of the experts of one that has some. The parameters are
    the fields of UpcycleOptions and PlanOptions.

    `siblings` are the opened checkpoints of `experts_from`, which are opened here when only their paths are given. Run
    such a plan with `execute(origins=origins_of(siblings))`. `overlay` has the measured rows of `router`, and is then
    the origin "overlay" of the plan; `partition` was measured for split, and its `file` is the origin "partition".
    Without them the plan has its final sizes, but it cannot be run. `copies` are the numbers of copies of each expert
    with keep_top_k (see upcycle/kept_top_k.py), and `added` the opened experts of add_experts_from
    (upcycle/added.py); run such a plan with `execute(origins=origins_of_added(added))`.

    Raises UsageError for a wrong parameter, InputError where the target cannot represent the model exactly.
    """
    check_names(parameters, UpcycleOptions, PlanOptions)
    options, common = from_keywords(UpcycleOptions, parameters), from_keywords(PlanOptions, parameters)
    return upcycle_plan(
        model, options, common, siblings=siblings, overlay=overlay, partition=partition, copies=copies,
        added=added,
    )  # fmt: skip


def upcycle_plan(
    model: Model, options: UpcycleOptions, common: PlanOptions, *, siblings: Sequence[Sibling] = (),
    overlay: SafetensorsFile | None = None, partition: Partition | None = None, copies: Copies | None = None,
    added: Sequence[Added] = (),
) -> Plan:  # fmt: skip
    """`plan_upcycle` with the parameters as option groups."""
    check_extends(model, options)
    check_reads(options)
    if model.family.kind == "moe" and options.to in (None, model.family.model_type) and not options.text_only:
        if options.keep_top_k:
            return plan_kept_top_k(model, options, common, copies)
        if options.add_experts_from or added:
            return plan_added(model, options, common, added or open_added(model, options), overlay)
        return plan_duplicate(model, options, common)
    made_with = _made_with(model, overlay)
    if options.experts_from and not siblings:
        siblings = open_siblings(model, options.experts_from, ffn_only=options.ffn_only)
    options, about_siblings = _with_siblings(model, options, siblings)
    splits = METHODS[options.method].partition
    if splits:
        options = split_options(model, options)
    shared = options.shared_experts is not None
    pair, target = find_conversion(model.family, options.to, shared=shared, text_only=options.text_only)
    cut = cut_ffn(model.ffn_width, granularity=_granularity(options), shared=options.shared_experts)
    cut = _counted(cut, options, len(siblings))
    options = replace(options, experts=cut.experts, top_k=cut.top_k)
    check_numbers(options, target, cut)
    shape = _shape(model, options, partition) if splits else None
    layers = split_layers(model, options, partition) if splits else _layers(model, options)
    if not layers:
        raise UsageError("--layers selects no layer", hint="Give at least one layer, or leave --layers out for all.")
    dtype = parse_dtype(common.dtype)
    if splits:
        check_router_rows(options, target, dtype or model.dtype)
    draft = _draft(model, pair, target, options, cut, layers, dtype)
    draft.warnings += about_siblings + _size_warnings(model, options, target, cut, dtype or model.dtype)
    assembly = Assembly(model, draft, options, cut, frozenset(layers), dtype, common.seed, tuple(siblings))
    items = assembly.items()
    if assembly.rounded:
        draft.warnings.append(
            f"{', '.join(sorted(set(assembly.rounded)))}: a constant of the source is folded into these weights, which "
            "are then rounded to their dtype; --dtype float32 keeps them exact"
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
        config=whole_config(model, target, draft.config, dtype=TORCH_NAMES[dtype] if dtype else None),
        shards=arrange(items, common, target),
        params_total=total,
        params_active=active,
        block={
            **_block(pair, options, cut, layers, exact=exact),
            **(split_block(partition, shape) if shape else {}),
        },
        warnings=(*model.warnings, *draft.warnings),
        dropped=(*model.dropped, *assembly.dropped),
        promise=assembly.promise(),
    )


def _shape(model: Model, options: UpcycleOptions, partition: Partition | None) -> SplitShape:
    """The shape of a split. Raises InputError for a partition that was measured for another shape."""
    shape = split_shape(model, options)
    if partition:
        check_partition(model, options, partition, shape)
    return shape


def _draft(
    model: Model, pair: Pair, target: Family, options: UpcycleOptions, cut: Cut, layers: tuple[int, ...],
    dtype: str | None,
) -> Draft:  # fmt: skip
    """The config and the tensors of the target, with the sizes of the experts and the dtype filled in."""
    draft = draft_target(model, pair, target)
    draft.config |= _sizes(model, draft, options, cut, layers)
    if cut.idle and draft.target.experts.routed_norm:
        # the experts start at zero, and a norm with another weight would scale up the first small values that they
        # learn
        draft.tensors[draft.target.experts.routed_norm] = fill(0.0)
    if dtype:
        draft.config.pop("torch_dtype", None)
        draft.config["dtype"] = TORCH_NAMES[dtype]
    return draft


def _size_warnings(model: Model, options: UpcycleOptions, target: Family, cut: Cut, dtype: str) -> list[str]:
    return check_widths(model, options, target, cut, dtype) + _ties(options, target, cut, dtype)


def origins_of(siblings: Sequence[Sibling]) -> dict[str, ByteSource]:
    """The byte sources of a plan with siblings, for the argument `origins` of `execute`."""
    return {sibling_origin(i): bytes_of(sibling) for i, sibling in enumerate(siblings)}


def router_rows(plan: Plan) -> tuple[dict[int, str], int]:
    """(layer -> name, number of rows) of the router tensors that a plan reads from its overlay."""
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
    model: Model, options: UpcycleOptions, siblings: Sequence[Sibling]
) -> tuple[UpcycleOptions, list[str]]:
    """The options with the method for siblings, and warnings about the siblings."""
    method = METHODS[options.method]
    if method.siblings == "must" and not siblings:
        raise UsageError(
            f"--method {options.method} needs --experts-from",
            hint="Name each sibling: --experts-from DIR1 --experts-from DIR2.",
        )
    if not siblings:
        return options, []
    if method.siblings == "no" or options.shared_experts == "full":
        word = "--shared-experts full" if options.shared_experts == "full" else f"--method {options.method}"
        raise UsageError(f"--experts-from cannot be combined with {word}", hint="Leave one of the two out.")
    warnings = check_siblings(model, siblings)
    return replace(options, method=method.with_siblings or options.method), warnings


def _counted(cut: Cut, options: UpcycleOptions, siblings: int) -> Cut:
    """The cut with the number of experts and the top-k. By default there is one copy per sibling, or as many whole
    copies as give the usual number of experts."""
    experts, top_k = options.experts, options.top_k
    if experts is None:
        experts = cut.pieces * (siblings or -(-EXPERTS // cut.pieces))
    if siblings and experts % (siblings * cut.pieces):
        raise UsageError(
            f"--experts {experts} must be a multiple of the {counted(siblings * cut.pieces, 'expert')} of "
            f"{counted(siblings, 'sibling')}",
            hint="Leave --experts out.",
        )
    if top_k is None:
        top_k = min(experts, cut.pieces * -(-TOP_K // cut.pieces))
    return replace(cut, experts=experts, top_k=top_k)


def _parameters(options: UpcycleOptions, common: PlanOptions, siblings: Sequence[Sibling]) -> dict[str, object]:
    """The parameters that the plan's id depends on; siblings have their identities there, not their paths."""
    made = parameters_of(options, common) | {"experts_from": [sibling.identity for sibling in siblings]}
    # a flag that is not set does not change the ids of plans that were made before the flag existed
    return {key: value for key, value in made.items() if value or key not in _LATER}


def _made_with(model: Model, overlay: SafetensorsFile | None) -> JsonObject | None:
    """The provenance of a router's rows. Raises InputError for rows that were measured on another model."""
    if overlay is None:
        return None
    return provenance(
        overlay,
        identity=model.identity,
        checkpoint=model.checkpoint,
        hint="Measure the router again on this checkpoint.",
    )


def _layers(model: Model, options: UpcycleOptions) -> tuple[int, ...]:
    return model.with_ffn(parse_layers(options.layers, layers=model.num_layers), every=options.layers == "all")


def _granularity(options: UpcycleOptions) -> int:
    return METHODS[options.method].granularity if options.granularity is None else options.granularity


def _block(pair: Pair, options: UpcycleOptions, cut: Cut, layers: tuple[int, ...], *, exact: bool) -> UpcycleBlock:
    """The step's block of the JSON. `exact` promises float32 logits that are equal up to rounding; the run checks
    it."""
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
    """The warning about ties: where the logits of two copies are equal after rounding, top-k can choose pieces of
    both."""
    rule = target.experts.routing
    if cut.pieces == 1 or not METHODS[options.method].grouped or cut.experts == cut.top_k or rule is None:
        return []
    if rule.float32 or rule.groups or dtype not in ("BF16", "F16"):
        return []
    return [
        f"{target.model_type} rounds the logits of its router to {TORCH_NAMES[dtype]}: where the logits of two copies "
        "become equal, a token can get pieces of both (0.3 to 0.8 % of tokens in bfloat16). "
        "This cannot happen with glm4_moe, dots1 and deepseek_v3"
    ]


def _idle_shared(items: Sequence[Item], target: Family, cut: Cut, active: int) -> list[str]:
    """The warning about a shared expert of zeros, which some families need, where it takes a share worth mentioning."""
    zeros = sum(spec.params for item in items for spec in item.outputs if spec.role.startswith("shared."))
    if cut.shared or zeros < _NEGLIGIBLE * active:
        return []
    return [
        f"{target.model_type} needs a shared expert as wide as a routed one, which is empty here: {zeros:,} parameters "
        f"of zero, {zeros / active:.0%} of those that compute each token. --method granular --granularity 8 makes "
        "it an eighth as wide, and with --shared-experts 1 it holds a piece of the FFN"
    ]


def _sizes(model: Model, draft: Draft, options: UpcycleOptions, cut: Cut, layers: tuple[int, ...]) -> JsonObject:
    """The config keys for the number of experts, their width, and the layers that have them. Raises InputError where
    the target cannot have experts in these layers alone."""
    target = draft.target
    sizes: JsonObject = dict.fromkeys(target.experts.count, cut.experts)
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
