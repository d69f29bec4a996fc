"""One more expert per sibling for a Mixture-of-Experts; all its own tensors and router rows keep their bits.

Where the new expert is not among a token's top-k, the token computes what it did: bit for bit with sigmoid scores or a
softmax of the chosen logits, up to rounding where a softmax over all experts is renormalised. A softmax over all
experts that is not renormalised has one more term, so that the weights shrink by the share of the new expert. The rows
are measured by upcycle/added_rows.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from moeconv.checkpoint.header import FLOAT_DTYPES, tensor_nbytes
from moeconv.checkpoint.overlay import provenance
from moeconv.checkpoint.safetensors_file import SafetensorsFile, TensorRef
from moeconv.errors import InputError, UsageError, escape
from moeconv.families.head import head_warnings, with_head
from moeconv.families.meaning import meaning
from moeconv.families.model import Model
from moeconv.families.spec import UNCHANGED, Role, with_expert
from moeconv.families.written import written_config
from moeconv.options import PlanOptions, UpcycleOptions
from moeconv.plan.arrange import arrange
from moeconv.plan.build import TORCH_NAMES, carry, count_planned, parse_dtype, whole
from moeconv.plan.flow import ByteSource
from moeconv.plan.overlay import ORIGIN, fingerprint
from moeconv.plan.plan import Input, Item, Plan, TensorSpec
from moeconv.units import counted
from moeconv.upcycle.duplicate import check_options, check_plain, given

_RANKS = (2, 4, 8)  # devices that experts are commonly spread over


@dataclass(frozen=True, eq=False)
class Added:
    """A new expert: the expert number `expert` of `model`, which has the model_type of the model that gets it. For a
    dense sibling, `model` is what `upcycle` would make of it, in memory. `keys` are those of config.json in which the
    two must agree; None: all. `identity` and `label` are those of the sibling."""

    model: Model
    expert: int
    identity: str
    label: str
    keys: frozenset[str] | None = None

    @cached_property
    def refs(self) -> dict[tuple[str, int | None, int | None], TensorRef]:
        """The tensors by key, layer and expert."""
        return {(r.key, r.layer, r.expert): self.model.checkpoint.tensors[n] for n, r in self.model.roles.items()}


def origin_of(index: int) -> str:
    """The origin of a new expert's tensors in a plan's inputs, by its position in --add-experts-from."""
    return f"added:{index + 1}"


def plan_added(
    model: Model, options: UpcycleOptions, common: PlanOptions, added: Sequence[Added],
    overlay: SafetensorsFile | None,
) -> Plan:  # fmt: skip
    """Plan the addition of one expert per sibling. `overlay` has the entries of the routers (added_rows.py). Without
    it, the plan has its final sizes, but cannot be run.

    Raises UsageError for options that do not apply, InputError where the config cannot hold the result, or an expert
    does not fit."""
    check_addition(model, options)
    for one in added:
        _check_fits(model, one)
    made_with = None if overlay is None else provenance(
        overlay, identity=model.identity, checkpoint=model.checkpoint, hint="Measure the rows again on this model."
    )  # fmt: skip
    dtype = parse_dtype(common.dtype)
    experts = model.num_experts + len(added)
    items = [item for name in model.checkpoint.tensors for item in _made(model, name, added, dtype)]
    total, active = count_planned(items, model.family, layers=model.num_layers, top_k=model.top_k, num_experts=experts)
    parameters = given(options, common) | {"add_experts_from": [one.identity for one in added], "experts_from": []}
    if overlay is not None:
        parameters |= {"overlay": fingerprint(overlay), "made_with": made_with}
    changes = dict.fromkeys(model.family.experts.count, experts)
    name = model.family.model_type
    return Plan(
        command="upcycle",
        parameters=parameters,
        identity=model.identity,
        config=written_config(
            with_head(model), model.family, changes=changes, dtype=TORCH_NAMES[dtype] if dtype else None
        ),
        shards=arrange(items, common, model.family),
        params_total=total,
        params_active=active,
        block={
            "method": "add", "from": name, "to": name, "num_experts": experts, "top_k": model.top_k,
            "moe_layers": list(model.moe_layers), "added": [one.label for one in added], "exact": False,
        },
        warnings=(*model.warnings, *head_warnings(model), *_warnings(model, experts)),
        dropped=model.dropped,
        promise=_promise(model, len(added)),
    )  # fmt: skip


def check_addition(model: Model, options: UpcycleOptions) -> None:
    """Raises what `plan_added` raises about the model and the options."""
    check_options(options)
    check_plain(model)
    for name in ("experts", "top_k", "stats"):
        if getattr(options, name) is not None:
            flag = name.replace("_", "-")
            raise UsageError(f"--add-experts-from and --{flag} exclude each other", hint=f"Leave out --{flag}.")
    if model.groups[0] > 1:
        raise InputError(
            f"{model.family.model_type} chooses among {model.groups[0]} groups of equal size of consecutive experts, "
            "so that one more expert would change the groups of all others",
            hint="--keep-top-k adds copies inside each group.",
        )
    if model.mtp_layers:
        raise InputError(
            "the model has multi-token-prediction layers with experts, of which a sibling has none",
            hint="Remove these layers first.",
        )
    if model.weighs_inputs:
        raise InputError(
            f"the weights of {model.family.model_type} multiply the inputs of its experts, not the outputs"
        )


def _check_fits(model: Model, one: Added) -> None:
    """Raises InputError where the layers around the new expert compute with other numbers, or its tensors differ."""
    family, theirs = model.family, meaning(one.model)
    if one.model.family.model_type != family.model_type:
        raise InputError(
            f"{one.label} is {one.model.family.model_type} and MODEL is {family.model_type}",
            hint="Give a fine-tuned copy of the model, or of its dense base.",
        )
    counts = {*family.experts.count, *family.experts.top_k}
    for key, value in meaning(model).items():
        compared = key not in counts and (one.keys is None or key in one.keys)
        if compared and theirs.get(key) != value:
            raise InputError(
                f"{one.label} has {escape(key)} = {escape(theirs.get(key))}, MODEL has {escape(value)}",
                hint="The sibling must be a fine-tune of the model, or of its dense base.",
            )
    if not 0 <= one.expert < one.model.num_experts:
        raise UsageError(
            f"--sibling-expert {one.expert}: {one.label} has the experts 0 to {one.model.num_experts - 1}",
            hint="Pass the number of one of them.",
        )


def _made(model: Model, name: str, added: Sequence[Added], dtype: str | None) -> Iterator[Item]:
    role, ref = model.roles.get(name), model.checkpoint.tensors[name]
    if role is None:
        return
    keeps = role.key in model.family.tensors.float32 or role.group in UNCHANGED
    cast = None if keeps else dtype
    if role.group == "expert" and role.expert is not None:
        yield carry(ref, role=role.key, dtype=cast)
        if role.expert == model.num_experts - 1:
            for i, one in enumerate(added):
                theirs = _ref(one, Role(role.key, role.layer, one.expert))
                _check_shape(one, theirs, theirs.shape, ref.shape)
                new = with_expert(name, role.expert, model.num_experts + i)
                to = cast or ref.dtype
                yield carry(theirs, role=role.key, name=new, dtype=to, changed="expert", origin=origin_of(i))
    elif role.group == "expert":
        yield _longer(model, ref, role, [_slice(model, one, i, role, ref) for i, one in enumerate(added)], cast)
    elif role.group == "router":
        each = math.prod(ref.shape) // model.num_experts
        rows = Input(_row_name(ref), "F32", (len(added) * each,), 0, 4 * len(added) * each, ORIGIN)
        yield _longer(model, ref, role, [rows], cast)
    else:
        yield carry(ref, role=role.key, dtype=cast)


def _longer(model: Model, ref: TensorRef, role: Role, more: Sequence[Input], dtype: str | None) -> Item:
    """A tensor with one slice per expert, [E, ...], [E * rows, ...] or [1, E], with more slices behind the old ones."""
    axis = 1 if ref.shape[0] == 1 and model.num_experts > 1 else 0
    count = sum(math.prod(part.shape) for part in more) // (math.prod(ref.shape) // ref.shape[axis])
    shape = list(ref.shape)
    shape[axis] += count
    out = dtype if dtype is not None and ref.dtype in FLOAT_DTYPES else ref.dtype
    flat = [Input(p.tensor, p.dtype, (math.prod(p.shape),), p.start, p.nbytes, p.origin) for p in (whole(ref), *more)]
    spec = TensorSpec(ref.name, out, tuple(shape), role.key, math.prod(shape))
    kernel = "copy" if all(part.dtype == out for part in flat) else "cast"
    return Item((spec,), kernel, tuple(flat), {}, role.group)


def _row_name(ref: TensorRef) -> str:
    """The name of the new entries of a router's tensor in the overlay."""
    return f"{ref.name}.added"


def router_entries(model: Model, count: int) -> dict[int, dict[str, tuple[str, str, tuple[int, ...]]]]:
    """{layer: {key: (name of the tensor, name in the overlay, shape [count, ...] there)}} of `count` new experts."""
    found: dict[int, dict[str, tuple[str, str, tuple[int, ...]]]] = {}
    for name, role in model.roles.items():
        if role.group == "router" and role.layer is not None:
            ref = model.checkpoint.tensors[name]
            each = math.prod(ref.shape) // model.num_experts
            found.setdefault(role.layer, {})[role.key] = name, _row_name(ref), (count, each)
    return found


def _slice(model: Model, one: Added, index: int, role: Role, ref: TensorRef) -> Input:
    """The bytes of the new expert in a tensor that holds all experts of a layer."""
    theirs = _ref(one, Role(role.key, role.layer))
    each = (ref.shape[0] // model.num_experts, *ref.shape[1:])
    _check_shape(one, theirs, (theirs.shape[0] // one.model.num_experts, *theirs.shape[1:]), each)
    size = tensor_nbytes(theirs.dtype, each)
    return Input(theirs.name, theirs.dtype, each, one.expert * size, size, origin_of(index))


def _ref(one: Added, role: Role) -> TensorRef:
    ref = one.refs.get((role.key, role.layer, role.expert))
    if ref is None:
        raise InputError(
            f"{one.label} has no {role.key} in layer {role.layer}",
            hint="It must have experts in the same layers, stored in the same layout.",
        )
    return ref


def _check_shape(one: Added, theirs: TensorRef, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected or theirs.dtype not in FLOAT_DTYPES:
        raise InputError(
            f"{one.label}: an expert has {theirs.dtype} {list(found)} in {escape(theirs.name)!r}, and MODEL has "
            f"{list(expected)}",
            hint="The FFN of the sibling must be as wide as an expert of the model.",
        )


def _warnings(model: Model, experts: int) -> list[str]:
    found = []
    lost = [n for n in _RANKS if model.num_experts % n == 0 and experts % n]
    if lost:
        found.append(
            f"{counted(experts, 'expert')} cannot be divided equally among {' or '.join(map(str, lost))} devices, as "
            f"{model.num_experts} can: expert parallelism needs equal shares"
        )
    rule = model.family.experts.routing
    if rule is not None and rule.score == "softmax" and not model.renormalises:
        found.append(
            "the weights of the old experts shrink by the share of the new ones also where those are not chosen: "
            f"{model.family.model_type} does not renormalise its softmax over all experts"
        )
    return found


def _promise(model: Model, count: int) -> dict[str, int]:
    """How many tensors of each role change, counted from the source and not from the items."""
    names = model.family.tensors.names
    layers = len(model.moe_layers)
    found = {"expert": 0, "router": sum(role.group == "router" for role in model.roles.values())}
    for key in {role.key for role in model.roles.values() if role.group == "expert"}:
        found["expert"] += layers * (count if "{E}" in names[key] else 1)
    return found


def origins_of_added(added: Sequence[Added]) -> dict[str, ByteSource]:
    """The byte sources of a plan with new experts, for the argument `origins` of `execute`."""
    return {origin_of(i): one.model.checkpoint for i, one in enumerate(added)}
