"""More experts for a model that has some: m adjacent copies of every expert and of its router row, and m times the
top-k.

Equal rows get equal scores, so that the m * k best experts are the m copies of the k best. Their weights sum to the old
ones: the division by the sum does that where the family renormalises, and the larger softmax where it does not.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence

from moeconv.checkpoint.header import FLOAT_DTYPES, tensor_nbytes
from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.errors import InputError, UsageError
from moeconv.families.head import head_warnings, with_head
from moeconv.families.model import Model
from moeconv.families.settings import MAX_EXPERTS, MAX_IN_ALL
from moeconv.families.spec import UNCHANGED, Role, with_expert
from moeconv.families.written import written_config
from moeconv.options import PlanOptions, UpcycleOptions, parameters_of
from moeconv.plan.arrange import arrange
from moeconv.plan.build import TORCH_NAMES, carry, count_planned, parse_dtype
from moeconv.plan.plan import Input, Item, Plan, TensorSpec
from moeconv.types import JsonObject

NEWER = (
    "keep_top_k",
    "copy_scale",
    "add_experts_from",
    "sibling_expert",
)  # options that are newer than the ids of plans


def plan_duplicate(model: Model, options: UpcycleOptions, common: PlanOptions) -> Plan:
    """Plan the duplication of all experts. `experts` is a multiple of the model's number of experts (default: twice).

    Raises UsageError for options that do not apply to it, InputError where the copies would not add up to the original.
    """
    check_options(options)
    _check_family(model)
    experts = 2 * model.num_experts if options.experts is None else options.experts
    times, rest = divmod(experts, model.num_experts)
    if rest or times < 2:
        raise UsageError(
            f"--experts {experts} must be 2, 3 or more times the source's {model.num_experts} experts",
            hint=f"Try --experts {model.num_experts * max(2, times)}.",
        )
    check_count(model, experts)
    top_k = times * model.top_k if options.top_k is None else options.top_k
    if not 1 <= top_k <= experts:
        raise UsageError(f"--top-k {top_k} must be from 1 to the number of experts ({experts})")
    dtype = parse_dtype(common.dtype)
    items = [item for name in model.checkpoint.tensors for item in _made(model, name, times, dtype)]
    total, active = count_planned(items, model.family, layers=model.num_layers, top_k=top_k, num_experts=experts)
    whole = top_k == times * model.top_k
    warnings = [*model.warnings, *head_warnings(model)]
    if not whole:
        warnings.append(
            f"--top-k {top_k} changes what the model computes: each expert has {times} copies, so that only "
            f"--top-k {times * model.top_k} keeps it"
        )
    return Plan(
        command="upcycle",
        parameters=given(options, common) | {"experts": experts, "top_k": top_k, "experts_from": []},
        identity=model.identity,
        config=_config(model, experts, top_k, times, dtype),
        shards=arrange(items, common, model.family),
        params_total=total,
        params_active=active,
        block={
            "method": "copy", "from": model.family.model_type, "to": model.family.model_type, "num_experts": experts,
            "top_k": top_k, "moe_layers": list(model.moe_layers), "copies": times,
            "exact": whole and dtype in (None, model.dtype, "F32"),
        },
        warnings=tuple(warnings),
        dropped=model.dropped,
        promise=_promise(model, times),
    )  # fmt: skip


def given(options: UpcycleOptions, common: PlanOptions) -> JsonObject:
    """The options of a plan. Newer ones that are not used are left out, so that the id stays as it was."""
    return {key: value for key, value in parameters_of(options, common).items() if value or key not in NEWER}


def check_options(options: UpcycleOptions) -> None:
    """Raises UsageError for an option that only the upcycle of a dense model uses."""
    usual = UpcycleOptions()
    for name in ("method", "layers", "granularity", "shared_experts", "experts_from", "router", "router_std"):
        if getattr(options, name) != getattr(usual, name):
            flag = name.replace("_", "-")
            raise UsageError(
                f"--{flag} is for dense sources: the experts of this one can only be copied",
                hint="Give --experts alone; `moeconv tune` then lets the copies differ.",
            )


def check_count(model: Model, experts: int) -> None:
    """Raises UsageError for more experts than a config.json may state."""
    most = min(MAX_EXPERTS, MAX_IN_ALL // model.num_layers)
    if experts > most:
        raise UsageError(f"--experts {experts} must be at most {most}", hint=f"Try --experts {2 * model.num_experts}.")


def check_plain(model: Model) -> None:
    """Raises InputError for a quantized model."""
    if model.quantization:
        raise InputError(
            "the source is quantized", hint="Copy the experts of the unquantized checkpoint, then quantize."
        )


def _check_family(model: Model) -> None:
    rule, name = model.family.experts.routing, model.family.model_type
    check_plain(model)
    if rule is None or not rule.equal:
        raise InputError(f"{name} gives experts with equal logits unequal weights, so that copies do not add up")
    if sums_best_of_groups(model):
        count, used = model.groups
        raise InputError(
            f"{name} first chooses {used} of {count} groups by their two best experts. With copies those two are the "
            "same expert, so that other groups could be chosen"
        )
    if rule.score == "sigmoid" and not model.renormalises and rule.scaling is None:
        raise InputError(
            f"{name} sums unnormalised sigmoid scores, so that copies would add up to a multiple of the output"
        )


def sums_best_of_groups(model: Model) -> bool:
    """Whether the router first chooses some of its groups of experts by the sum of several scores in each, which
    copies change."""
    rule, (count, used) = model.family.experts.routing, model.groups
    return rule is not None and rule.best_of_group > 1 and used < count


def corrects_softmax(model: Model) -> bool:
    """Whether the choice is by softmax scores plus a bias: scores get smaller with more experts, and the bias does
    not."""
    rule = model.family.experts.routing
    corrected = any(role.key.startswith("router.correction") for role in model.roles.values())
    return rule is not None and rule.score == "softmax" and corrected


def _made(model: Model, name: str, times: int, dtype: str | None) -> Iterator[Item]:
    role = model.roles.get(name)
    if role is None:
        return
    of = [e for e in range(model.num_experts) for _ in range(times)]
    if role.key.startswith("router.correction") and corrects_softmax(model):
        # the bias is added to softmax scores, which are 1/m as large over m times the experts
        item = repeated(model, model.checkpoint.tensors[name], role, of, dtype)
        parts = [["input", {"index": i}, []] for i in range(model.num_experts) for _ in range(times)]
        tree = ["scale", {"by": 1 / times}, [["concat", {}, parts]]]
        yield Item(item.outputs, "compute", item.inputs[::times], {"tree": tree}, role.group)
    else:
        yield from copied(model, name, role, of, dtype)


def copied(model: Model, name: str, role: Role, of: Sequence[int], dtype: str | None) -> Iterator[Item]:
    """The items of a source tensor where new expert i is a copy of the old expert of[i], in ascending order."""
    ref = model.checkpoint.tensors[name]
    if role.group == "expert" and role.expert is not None:
        for new in range(bisect_left(of, role.expert), bisect_right(of, role.expert)):
            yield carry(ref, role=role.key, name=with_expert(name, role.expert, new), dtype=dtype, changed="expert")
    elif role.group in ("expert", "router"):
        yield repeated(model, ref, role, of, dtype)
    else:
        kept = role.key in model.family.tensors.float32 or role.group in UNCHANGED
        yield carry(ref, role=role.key, dtype=None if kept else dtype)


def repeated(model: Model, ref: TensorRef, role: Role, of: Sequence[int], dtype: str | None) -> Item:
    """A tensor with one slice per expert, [E, ...] or [1, E], as one with the slices of the experts `of`."""
    row = ref.shape[0] == 1 and model.num_experts > 1
    slices = math.prod(ref.shape) // model.num_experts
    each = tensor_nbytes(ref.dtype, (slices,))
    inside = (1,) if row else (ref.shape[0] // model.num_experts, *ref.shape[1:])
    inputs = tuple(Input(ref.name, ref.dtype, inside, e * each, each) for e in of)
    shape = (1, len(of)) if row else (inside[0] * len(of), *ref.shape[1:])
    casts = dtype is not None and ref.dtype in FLOAT_DTYPES and role.key not in model.family.tensors.float32
    made = dtype if casts and dtype else ref.dtype
    spec = TensorSpec(ref.name, made, shape, role.key, math.prod(shape))
    return Item((spec,), "copy" if made == ref.dtype else "cast", inputs, {}, role.group)


def _config(model: Model, experts: int, top_k: int, times: int, dtype: str | None) -> JsonObject:
    changes: JsonObject = dict.fromkeys(model.family.experts.count, experts)
    changes |= dict.fromkeys(model.family.experts.top_k, top_k)
    rule = model.family.experts.routing
    if rule and rule.score == "sigmoid" and rule.scaling and not model.renormalises:
        changes[rule.scaling] = (model.value(rule.scaling) or 1.0) / times
    return written_config(with_head(model), model.family, changes=changes, dtype=TORCH_NAMES[dtype] if dtype else None)


def _promise(model: Model, times: int) -> dict[str, int]:
    """How many tensors of each role change, counted from the source and not from the items."""
    count = {"expert": 0, "router": 0}
    for role in model.roles.values():
        if role.group in count:
            count[role.group] += 1 if role.expert is None else times
    return count
