"""More experts with the same top-k (expert upcycling, arXiv 2604.19835): copies of the experts, where a copy competes
less than its original.

With equal router rows, a token would get two copies of one expert, and its other experts would fall out. The row of the
r-th copy is therefore mean + a^r (row - mean), where `mean` is the mean of the layer's rows and a is --copy-scale. For
every token, the logit of a copy is then as far above the mean logit of the old experts as the logit of its original,
times a^r. What follows, for 0 <= a < 1:

- The copy of a chosen expert is below its original wherever the original is above the mean. A token computes what it
  did if its k-th best logit is above that of every copy: a copy of the best expert enters only where
  a * (best - mean) > k-th best - mean.
- The weights of such a token are the old ones where the family renormalises them, or takes them from each expert's own
  logit (sigmoid). A softmax over all experts that is not renormalised has more terms, so that all weights shrink.
- Where the family adds a correction bias to sigmoid scores for the choice, a = 0 gives copies a bias below all others:
  no token chooses them, and the model is exact until training raises the bias.
- With top-1, a = 1 is exact: whichever copy is chosen has the weights and the logit of its original.
- Two rules of choice depend on the copies as well. A router that first chooses groups by the sum of their two best
  scores may choose other groups. Where a correction bias is added to softmax scores, these get smaller with more
  experts, and the bias is multiplied by E / E' for E' experts: exact for a = 1 and equal numbers of copies.

The rule is invariant under what a softmax does not depend on (a vector added to all rows), and needs no data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moeconv.errors import UsageError
from moeconv.families.head import head_warnings, with_head
from moeconv.families.model import Model
from moeconv.families.written import written_config
from moeconv.options import PlanOptions, UpcycleOptions, parameters_of
from moeconv.plan.arrange import arrange
from moeconv.plan.build import TORCH_NAMES, count_planned, parse_dtype, whole
from moeconv.plan.plan import Item, Plan
from moeconv.types import Config
from moeconv.units import counted
from moeconv.upcycle.duplicate import (
    check_count,
    check_options,
    check_plain,
    copied,
    corrects_softmax,
    repeated,
    sums_best_of_groups,
)

Copies = Mapping[int, Sequence[int]]  # layer -> the number of copies of each old expert, itself included

_SCALE = 0.5
_LOGITS = ("router.weight", "router.bias")  # the tensors that a logit is computed with


def plan_kept_top_k(model: Model, options: UpcycleOptions, common: PlanOptions, copies: Copies | None) -> Plan:
    """Plan more experts with the same top-k. `copies` are the numbers of copies, by utility; None: equal numbers.

    Raises UsageError for options that do not apply, InputError for a model whose config cannot hold the result.
    """
    experts = number_of_experts(model, options)
    scale = copy_scale(model, options)
    even = copies is None
    counts = _whole(model, copies if copies is not None else dict.fromkeys(model.moe_layers, _even(model, experts)))
    dtype = parse_dtype(common.dtype)
    items = [item for name in model.checkpoint.tensors for item in _made(model, name, counts, scale, dtype)]
    total, active = count_planned(
        items, model.family, layers=model.num_layers, top_k=model.top_k, num_experts=experts
    )  # fmt: skip
    exact = _exact(model, scale, counts)
    made = parameters_of(options, common) | {"experts": experts, "copy_scale": scale, "stats": None, "experts_from": []}
    return Plan(
        command="upcycle",
        parameters=made if even else made | {"copies": {str(layer): list(of) for layer, of in counts.items()}},
        identity=model.identity,
        config=_config(model, experts, dtype),
        shards=arrange(items, common, model.family),
        params_total=total,
        params_active=active,
        block={
            "method": "copy", "from": model.family.model_type, "to": model.family.model_type, "num_experts": experts,
            "top_k": model.top_k, "moe_layers": list(model.moe_layers), "copy_scale": scale,
            "copies_of": {str(layer): list(of) for layer, of in counts.items()},
            "exact": exact and dtype in (None, model.dtype, "F32"),
        },
        warnings=(*model.warnings, *head_warnings(model), *_warnings(model, scale, exact)),
        dropped=model.dropped,
        promise=_promise(model, counts),
    )  # fmt: skip


def number_of_experts(model: Model, options: UpcycleOptions) -> int:
    """The number of experts of the result. Raises what `plan_kept_top_k` raises."""
    check_options(options)
    check_plain(model)
    if options.top_k is not None:
        raise UsageError("--keep-top-k and --top-k exclude each other", hint="Leave out --top-k.")
    old, groups = model.num_experts, model.groups[0]
    experts = 2 * old if options.experts is None else options.experts
    if experts <= old:
        raise UsageError(f"--experts {experts} must be more than the source's {old}", hint=f"Try --experts {2 * old}.")
    check_count(model, experts)
    if experts % groups:
        raise UsageError(
            f"--experts {experts}: {model.family.model_type} chooses among {groups} groups of equal size",
            hint=f"Pass a multiple of {groups}.",
        )
    return experts


def copy_scale(model: Model, options: UpcycleOptions) -> float:
    """--copy-scale, or its default. Raises UsageError for a value outside 0 to 1."""
    if options.copy_scale is None:
        return 1.0 if model.top_k == 1 and not sums_best_of_groups(model) else _SCALE
    if not 0 <= options.copy_scale <= 1:
        raise UsageError(f"--copy-scale {options.copy_scale} must be from 0 to 1", hint="The default is 0.5.")
    return options.copy_scale


def by_utility(model: Model, experts: int, utility: Sequence[float]) -> list[int]:
    """How many copies each old expert gets: one each, and the others one by one to the expert with the largest utility
    per copy (D'Hondt's rule), in each group of the router for itself. Equal utilities give equal numbers."""
    groups = model.groups[0]
    size, more = model.num_experts // groups, (experts - model.num_experts) // groups
    counts = [1] * model.num_experts
    for group in range(groups):
        inside = range(group * size, (group + 1) * size)
        for _ in range(more):
            best = max(inside, key=lambda e: (utility[e] / counts[e], -counts[e], -e))
            counts[best] += 1
    return counts


def new_of(counts: Sequence[int]) -> list[int]:
    """The numbers of the experts that are new, where each old expert becomes `counts` adjacent ones."""
    return [i for i, rank in enumerate(_ranks(counts)) if rank]


def _ranks(counts: Sequence[int]) -> list[int]:
    """The number of the copy that each expert is; 0 for the expert itself."""
    return [rank for count in counts for rank in range(count)]


def _even(model: Model, experts: int) -> list[int]:
    if experts % model.num_experts:
        raise UsageError(
            f"--experts {experts} is not a multiple of the source's {model.num_experts}, so that it must be decided "
            "which experts get more copies",
            hint="Pass --stats or --data to decide by utility, or a multiple.",
        )
    return [experts // model.num_experts] * model.num_experts


def _whole(model: Model, copies: Copies) -> dict[int, list[int]]:
    """The copies of every layer with experts: prediction layers that were not measured have those of the last layer."""
    last = copies[model.moe_layers[-1]]
    return {layer: list(copies.get(layer, last)) for layer in (*model.moe_layers, *model.mtp_layers)}


def _exact(model: Model, scale: float, copies: Copies) -> bool:
    """Whether every token computes what it did."""
    rule = model.family.experts.routing
    own = rule is not None and rule.equal and (model.renormalises or rule.score != "softmax")
    if model.top_k == 1 and scale == 1:
        even = all(len(set(counts)) == 1 for counts in copies.values())
        return own and not sums_best_of_groups(model) and (even or not corrects_softmax(model))
    return own and scale == 0 and _waits(model)


def _waits(model: Model) -> bool:
    """Whether a correction bias on sigmoid scores can keep copies from being chosen."""
    rule = model.family.experts.routing
    return rule is not None and rule.score == "sigmoid" and _corrected(model)


def _corrected(model: Model) -> bool:
    return any(role.key.startswith("router.correction") for role in model.roles.values())


def _made(model: Model, name: str, copies: Mapping[int, Sequence[int]], scale: float, dtype: str | None) -> list[Item]:
    role = model.roles.get(name)
    if role is None:
        return []
    counts = copies.get(role.layer, ()) if role.layer is not None else ()
    of = [e for e, count in enumerate(counts) for _ in range(count)]
    waits = role.key.startswith("router.correction") and scale == 0 and _waits(model)
    softer = role.key.startswith("router.correction") and corrects_softmax(model)
    if (role.key in _LOGITS and scale < 1) or waits or softer:
        how = {"of": of, "rank": _ranks(counts), "experts": model.num_experts}
        how |= {"below": True} if waits else {"times": model.num_experts / len(of)} if softer else {"by": scale}
        ref = model.checkpoint.tensors[name]
        outputs = repeated(model, ref, role, of, dtype).outputs
        return [Item(outputs, "copied_rows", (whole(ref),), how, role.group)]
    return list(copied(model, name, role, of, dtype))


def _warnings(model: Model, scale: float, exact: bool) -> list[str]:
    rule = model.family.experts.routing
    equal = "the copies of an expert are equal: training must let them differ, such as `moeconv tune`"
    shrink = rule is not None and rule.score == "softmax" and not model.renormalises
    if exact and scale == 1:
        return [equal]
    if exact:
        return [
            "no token chooses a copy until its correction bias rises: train with a balance by bias, such as "
            "`moeconv tune --bias-update 0.001`"
        ]
    if shrink and scale == 1 and model.top_k == 1:
        return ["not exact: a token's expert has a smaller weight, since the softmax is over more experts", equal]
    if sums_best_of_groups(model):
        unless = " or counts for the choice of groups"
    else:
        unless = " or changes the choice by its share of the softmax" if corrects_softmax(model) else ""
    return [
        "not exact: a token computes what it did, "
        + ("with smaller weights, since its softmax is over more experts, " if shrink else "")
        + f"unless a copy, whose logit is {scale:g} times as far above the mean as its original's, is among its "
        f"{counted(model.top_k, 'best logit')}{unless}"
    ]


def _config(model: Model, experts: int, dtype: str | None) -> Config:
    changes = dict.fromkeys(model.family.experts.count, experts)
    return written_config(with_head(model), model.family, changes=changes, dtype=TORCH_NAMES[dtype] if dtype else None)


def _promise(model: Model, copies: Mapping[int, Sequence[int]]) -> dict[str, int]:
    """How many tensors of each role change, counted from the source and not from the items."""
    count = {"expert": 0, "router": 0}
    for role in model.roles.values():
        if role.group in count and role.layer is not None:
            count[role.group] += 1 if role.expert is None else copies[role.layer][role.expert]
    return count


def check_extends(model: Model, options: UpcycleOptions) -> None:
    """Raises UsageError for --keep-top-k and --add-experts-from together, with another source than a
    Mixture-of-Experts, and for an option that is used with one of them where it is not given."""
    if options.copy_scale is not None and not options.keep_top_k:
        raise UsageError("--copy-scale goes with --keep-top-k", hint="Add --keep-top-k, or leave --copy-scale out.")
    if options.sibling_expert is not None and not options.add_experts_from:
        raise UsageError("--sibling-expert goes with --add-experts-from", hint="Leave --sibling-expert out.")
    if options.keep_top_k and options.add_experts_from:
        raise UsageError("--keep-top-k and --add-experts-from exclude each other", hint="Run one after the other.")
    if not (options.keep_top_k or options.add_experts_from):
        return
    same = options.to in (None, model.family.model_type) and not options.text_only
    if model.family.kind != "moe" or not model.moe_layers or not same:
        flag = "--keep-top-k" if options.keep_top_k else "--add-experts-from"
        raise UsageError(
            f"{flag} gives a Mixture-of-Experts more experts, and it stays in its family",
            hint="Leave it out: a dense source has --top-k and --experts-from.",
        )
