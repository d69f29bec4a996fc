"""The plan of an import: every tensor of the file decoded, under its name in transformers, with its rows in order.

Names and changes are those of the rows of quantize/gguf/llama_cpp, in reverse. The plan is kept only if the same rows,
applied to the model that it writes, give the tensors and the hyperparameters of this file.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from moeconv.checkpoint.gguf_source import GgufSource
from moeconv.checkpoint.header import TensorRef
from moeconv.errors import InputError, Unsupported, escape
from moeconv.families.model import Model
from moeconv.families.spec import Family
from moeconv.importing.check import check_import
from moeconv.importing.config import FACTORS, candidates
from moeconv.importing.tokenizer import tokenizer_files
from moeconv.options import ImportOptions, parse_size
from moeconv.plan.build import TORCH_NAMES, count_params, parse_dtype, rows, whole
from moeconv.plan.plan import Input, Item, Plan, TensorSpec, pack_shards
from moeconv.plan.planned import planned_model
from moeconv.quantize.gguf.llama_cpp import LlamaCpp
from moeconv.quantize.gguf.llama_cpp.expression import Expression
from moeconv.quantize.gguf.llama_cpp.names import NAMES

ORIGIN = "gguf"  # the origin of the file in the plan: execute(..., origins={ORIGIN: source})
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")


def plan_import(source: GgufSource, options: ImportOptions) -> tuple[Plan, Model]:
    """(the plan, the model that it writes). Raises Unsupported for a file with another architecture, InputError for one
    whose tensors contradict its metadata."""
    reasons: list[InputError] = []
    for family, row, config in candidates(source):
        try:
            plan = _plan(source, family, row, config, options)
            model = _model(source, family, plan)
            check_import(source, model)
            total, active = count_params(model)
            return replace(plan, params_total=total, params_active=active), model
        except InputError as reason:
            reasons.append(reason)
    first = reasons[0]
    raise type(first)(f"{escape(source.path.name)}: {first.message}", hint=first.hint)


def _plan(
    source: GgufSource, family: Family, row: LlamaCpp, config: Mapping[str, object], options: ImportOptions
) -> Plan:
    dtype = parse_dtype(options.dtype) or "BF16"
    word = TORCH_NAMES[dtype]
    stated = {**config, "dtype": word}
    items = [
        item
        for ref in source.tensors.values()
        if ref.name != FACTORS
        for item in _items(ref, family, row, dtype, stated)
    ]
    shards = pack_shards(items, shard_size=parse_size(options.shard_size, flag="--shard-size"))
    types = dict(Counter(ref.dtype for ref in source.tensors.values()))
    block = {"architecture": source.metadata["general.architecture"], "types": types, "dtype": word}
    texts, warnings = tokenizer_files(source)
    return Plan(
        "import", {"dtype": word, "shard_size": options.shard_size}, source.identity(), stated, shards, 0, 0, block,
        warnings=tuple(warnings), texts=texts,
    )  # fmt: skip


def _model(source: GgufSource, family: Family, plan: Plan) -> Model:
    """The model that the plan writes. Raises Unsupported where config.json and its tensors would not agree."""
    try:
        return planned_model(plan, name=source.path.stem)
    except InputError as reason:
        raise Unsupported(
            f"as {family.model_type}, the file would not give a complete checkpoint: {reason.message}",
            hint="Use the original model, or download the file again if it may be damaged.",
        ) from None


def _items(ref: TensorRef, family: Family, row: LlamaCpp, dtype: str, config: Mapping[str, object]) -> list[Item]:
    layer, key = _key(ref.name, row)
    _check_place(family, key)
    if not key.startswith("expert."):
        name = family.name(key, layer=layer)
        return [_item(whole(ref, origin=ORIGIN), name, key, row, dtype, config)]
    found = []
    for expert in range(ref.shape[0]):
        part = rows(ref, expert, 1, origin=ORIGIN)
        name = family.name(key, layer=layer, expert=expert)
        found.append(_item(part._replace(shape=ref.shape[1:]), name, key, row, dtype, config))
    return found


def _check_place(family: Family, key: str) -> None:
    """Raises Unsupported for a tensor that the family does not have as a tensor of its own."""
    if family.has(key) and (not key.startswith("expert.") or "{E}" in family.tensors.names[key]):
        return
    raise Unsupported(
        f"{family.model_type} is not imported: it has no separate tensor for {key}",
        hint="Use the original model.",
    )


def _item(part: Input, name: str, key: str, row: LlamaCpp, dtype: str, config: Mapping[str, object]) -> Item:
    params: dict[str, object] = {}
    change = row.changes.get(key)
    if change is not None:
        made = change(config.get, Expression((part.shape[0], 1)))
        piece = made.get("")
        if set(made) != {""} or piece is None or piece.computed or piece.shape != (part.shape[0], 1):
            raise Unsupported(f"moeconv cannot reverse how llama.cpp stores {key}", hint="Use the original model.")
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
