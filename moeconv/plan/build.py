"""Small functions that every planner uses: carry a tensor over, select rows of it, cast it, count parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from moeconv.checkpoint.header import FLOAT_DTYPES, tensor_nbytes
from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.errors import UsageError, escape
from moeconv.families.model import Model
from moeconv.families.spec import UNCHANGED, Family
from moeconv.plan.plan import Input, Item, TensorSpec

# --dtype, which is named as in torch -> the dtype as safetensors names it
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
TORCH_NAMES = {v: k for k, v in DTYPES.items()}


def parse_dtype(name: str | None) -> str | None:
    """`--dtype` as safetensors names it; None keeps that of the source. Raises UsageError for an unknown name."""
    if name is None or name in ("source", "auto"):
        return None
    if name not in DTYPES:
        raise UsageError(f"unknown --dtype {escape(name)}", hint=f"One of: {', '.join(DTYPES)}.")
    return DTYPES[name]


def whole(ref: TensorRef, *, origin: str = "source") -> Input:
    """The whole of a tensor."""
    return Input(ref.name, ref.dtype, ref.shape, 0, ref.nbytes, origin)


def rows(ref: TensorRef, first: int, count: int, *, origin: str = "source") -> Input:
    """`count` rows (slices of the first dimension) of a tensor, as one byte range."""
    shape = (count, *ref.shape[1:])
    row = tensor_nbytes(ref.dtype, ref.shape[1:])
    return Input(ref.name, ref.dtype, shape, first * row, count * row, origin)


def pick_rows(ref: TensorRef, chosen: Sequence[int], *, origin: str = "source") -> tuple[Input, ...]:
    """The chosen rows of a tensor in the given order; adjacent rows are joined into one range."""
    ranges: list[Input] = []
    start = 0
    for i in range(1, len(chosen) + 1):
        if i == len(chosen) or chosen[i] != chosen[i - 1] + 1:
            ranges.append(rows(ref, chosen[start], i - start, origin=origin))
            start = i
    return tuple(ranges)


def carry(
    ref: TensorRef, *, role: str, name: str | None = None, dtype: str | None = None, params: int | None = None,
    changed: str = "", origin: str = "source",
) -> Item:  # fmt: skip
    """The tensor as it is, under `name` where that is given. It is cast where `dtype` is another float dtype."""
    casts = dtype is not None and ref.dtype in FLOAT_DTYPES and ref.dtype != dtype
    out_dtype = dtype if casts and dtype else ref.dtype
    count = math.prod(ref.shape) if params is None else params
    spec = TensorSpec(name or ref.name, out_dtype, ref.shape, role, count)
    kernel = "cast" if casts else "copy"
    return Item((spec,), kernel, (whole(ref, origin=origin),), {}, changed)


PREDICTION = "prediction"  # the group of the tensors of multi-token-prediction layers, where parameters are counted


def groups_of(model: Model) -> Iterator[tuple[TensorRef, str]]:
    """Every tensor that has a role, with the group that it is counted in."""
    predicts, layers, tensors = model.family.predicts, model.num_layers, model.checkpoint.tensors
    for name, role in model.roles.items():
        yield tensors[name], PREDICTION if predicts(name, layers=layers) else role.group


def count_params(model: Model) -> tuple[int, int]:
    """(total, active per token) parameters of a checkpoint. Multi-token-prediction layers, which run only for
    speculative decoding, are left out; a tied embedding counts once."""
    groups: dict[str, int] = {}
    for ref, group in groups_of(model):
        groups[group] = groups.get(group, 0) + model.numel(ref)
    return active_of(groups, top_k=model.top_k, num_experts=model.num_experts)


def count_planned(
    items: Iterable[Item], family: Family, *, layers: int, top_k: int, num_experts: int
) -> tuple[int, int]:  # fmt: skip
    """(total, active per token) parameters of the output of a plan for a `family` with that many `layers`, counted as
    by `count_params`."""
    groups: dict[str, int] = {}
    for item in items:
        for spec in item.outputs:
            if spec.params:  # scales and the like count with their codes
                group = PREDICTION if family.predicts(spec.name, layers=layers) else spec.role.partition(".")[0]
                groups[group] = groups.get(group, 0) + spec.params
    return active_of(groups, top_k=top_k, num_experts=num_experts)


def active_of(groups: Mapping[str, int], *, top_k: int, num_experts: int) -> tuple[int, int]:
    """(total, active per token) parameters, from the parameters of each group of tensors."""
    total = sum(groups.values()) - groups.get(PREDICTION, 0)
    experts, beside = groups.get("expert", 0), sum(groups.get(group, 0) for group in UNCHANGED)
    return total, total - experts - beside + (experts * top_k // num_experts if num_experts else 0)


def carry_all(model: Model, *, dtype: str | None, replace: Callable[[TensorRef], Iterable[Item] | None]) -> list[Item]:
    """The items for every source tensor, in the order of the files: those that `replace` returns for it, or the tensor
    itself where that is None. Tensors outside the language model and lookup tables keep
    their dtype."""
    items: list[Item] = []
    refs = model.checkpoint.tensors
    for name in refs:
        if name not in model.roles:
            continue
        made = replace(refs[name])
        if made is None:
            role = model.roles[name]
            to = None if role.group in UNCHANGED else dtype
            made = [carry(refs[name], role=role.key, dtype=to, params=model.numel(refs[name]))]
        items.extend(made)
    return items
