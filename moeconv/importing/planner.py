"""The plan of an import: every tensor of the file decoded, under its name in transformers, with its rows in order.

Names and changes are the rows of quantize/llama_cpp, read backwards. The plan is kept only if the model that it writes
gives, by the same rows, the tensors and the hyperparameters of this file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

from moeconv.checkpoint.gguf_source import GgufSource
from moeconv.checkpoint.header import TensorRef
from moeconv.errors import InputError, Unsupported, escape
from moeconv.families.model import Model
from moeconv.families.spec import Family
from moeconv.importing.config import candidates
from moeconv.importing.tokenizer import tokenizer_files
from moeconv.options import ImportOptions, parse_size
from moeconv.plan.build import count_params, parse_dtype, rows, whole
from moeconv.plan.plan import Input, Item, Plan, TensorSpec, pack_shards
from moeconv.plan.planned import planned_model
from moeconv.quantize.llama_cpp import LlamaCpp, find_row, written
from moeconv.quantize.llama_cpp.expression import Expression
from moeconv.quantize.llama_cpp.names import NAMES
from moeconv.quantize.llama_cpp.numbers import hyperparameters

ORIGIN = "gguf"  # what the inputs of the plan call the file: execute(..., origins={ORIGIN: source})
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")


def plan_import(source: GgufSource, options: ImportOptions) -> tuple[Plan, Model]:
    """(the plan, the model that it writes). Raises Unsupported for a file of another architecture, InputError for one
    whose tensors and metadata do not belong together."""
    reasons: list[InputError] = []
    for family, row, config in candidates(source):
        try:
            plan = _plan(source, family, row, config, options)
            model = planned_model(plan, name=source.path.stem)
            _check(source, model)
            total, active = count_params(model)
            return _counted(plan, total, active), model
        except InputError as reason:
            reasons.append(reason)
    first = reasons[0]
    raise type(first)(f"{escape(source.path.name)}: {first.message}", hint=first.hint)


def _plan(
    source: GgufSource, family: Family, row: LlamaCpp, config: Mapping[str, object], options: ImportOptions
) -> Plan:
    dtype = parse_dtype(options.dtype) or "BF16"
    word = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[dtype]
    stated = {**config, "dtype": word}
    constants = ("rope_freqs.weight",)
    items = [
        item
        for ref in source.tensors.values()
        if ref.name not in constants
        for item in _items(ref, family, row, dtype, stated)
    ]
    shards = pack_shards(items, shard_size=parse_size(options.shard_size, flag="--shard-size"))
    types: dict[str, int] = {}
    for ref in source.tensors.values():
        types[ref.dtype] = types.get(ref.dtype, 0) + 1
    block = {"architecture": source.metadata["general.architecture"], "types": types, "dtype": word}
    texts, warnings = tokenizer_files(source)
    return Plan(
        "import", {"dtype": word, "shard_size": options.shard_size}, source.identity(), stated, shards, 0, 0, block,
        warnings=tuple(warnings), texts=texts,
    )  # fmt: skip


def _counted(plan: Plan, total: int, active: int) -> Plan:
    return replace(plan, params_total=total, params_active=active)


def _items(ref: TensorRef, family: Family, row: LlamaCpp, dtype: str, config: Mapping[str, object]) -> list[Item]:
    layer, key = _key(ref.name, row)
    if not key.startswith("expert."):
        name = family.name(key, layer=layer)
        return [_item(whole(ref, origin=ORIGIN), name, key, row, dtype, config)]
    found = []
    for expert in range(ref.shape[0]):
        part = rows(ref, expert, 1, origin=ORIGIN)
        name = family.name(key, layer=layer, expert=expert)
        found.append(_item(part._replace(shape=ref.shape[1:]), name, key, row, dtype, config))
    return found


def _item(part: Input, name: str, key: str, row: LlamaCpp, dtype: str, config: Mapping[str, object]) -> Item:
    params: dict[str, object] = {}
    change = row.changes.get(key)
    if change is not None:
        made = change(config.get, Expression((part.shape[0], 1)))
        piece = made.get("")
        if set(made) != {""} or piece is None or piece.computed or piece.shape != (part.shape[0], 1):
            raise Unsupported(f"what llama.cpp does to {key} is not undone", hint="Use the original model.")
        params = {"order": piece.tree}
    spec = TensorSpec(name, dtype, part.shape, key, math.prod(part.shape))
    return Item((spec,), "from_gguf", (part,), params, key.partition(".")[0])


def _key(name: str, row: LlamaCpp) -> tuple[int | None, str]:
    """(layer, key) of a tensor of the file. Raises Unsupported for a name that the row does not know."""
    found = _LAYER.fullmatch(name)
    layer, pattern = (int(found[1]), f"blk.{{L}}.{found[2]}") if found else (None, name)
    for key in (*row.names, *(key for key in NAMES if key not in row.names)):
        if row.names.get(key, NAMES.get(key)) == pattern:
            return layer, key
    raise Unsupported(f"tensor {escape(name)!r} has no place in this family", hint="Use the original model.")


def _check(source: GgufSource, model: Model) -> None:
    """Raises InputError unless the model, written by the rows, has the tensors and the hyperparameters of the file."""
    row = find_row(model)
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for name, role in model.roles.items():
        for tensor in written(model, row, model.checkpoint.tensors[name], role):
            shapes.setdefault(tensor.target, []).append(tensor.part.shape)
    for constant in row.constants(model):
        shapes[constant.name] = [(len(constant.values),)]
    for name, found in shapes.items():
        expected = (len(found), *found[0]) if "_exps." in name else found[0]
        if name not in source.tensors or source.tensors[name].shape != expected:
            has = list(source.tensors[name].shape) if name in source.tensors else "nothing"
            raise InputError(f"{escape(name)} should be {list(expected)}, and the file has {has}", hint=_DAMAGED)
    if stray := sorted(set(source.tensors) - set(shapes)):
        raise Unsupported(f"tensor {escape(stray[0])!r} has no place in this family", hint="Use the original model.")
    for key, value in hyperparameters(model, row).items():
        stated = source.metadata.get(f"{row.arch}.{key}", value)
        if not _equal(stated, value):
            raise InputError(
                f"{row.arch}.{key} is {escape(stated)}, and its tensors need {escape(value)}", hint=_DAMAGED
            )


_DAMAGED = "The file is damaged, or made by a program that moeconv does not know."


def _equal(one: object, other: object) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(_equal(a, b) for a, b in zip(one, other))
    if isinstance(one, float) or isinstance(other, float):
        return (
            isinstance(one, int | float) and isinstance(other, int | float) and math.isclose(one, other, rel_tol=1e-6)
        )
    return one == other
