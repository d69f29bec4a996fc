"""--format gguf: one file for llama.cpp, which includes config and tokenizer. It is written expert by expert."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from moeconv.checkpoint.gguf import Stack
from moeconv.checkpoint.header import BLOCK_DTYPES
from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.errors import InputError, UsageError, escape
from moeconv.families.model import Model
from moeconv.families.spec import BESIDE, Role
from moeconv.options import QuantizeOptions, parse_size
from moeconv.plan.plan import Item, Shard, TensorSpec
from moeconv.quantize.budget import byte_budget, too_small
from moeconv.quantize.gguf.importance import Columns
from moeconv.quantize.gguf.llama_cpp import Constant, GgufTensor, LlamaCpp, find_row, is_float32, supported, written
from moeconv.quantize.gguf.llama_cpp.numbers import hyperparameters
from moeconv.quantize.gguf.metadata import metadata
from moeconv.quantize.gguf.mixed import AMONG, MIXES, MixedTensor, MixedTypes, choose_types
from moeconv.quantize.gguf.parts import split, stem_of
from moeconv.quantize.gguf.recipes import Facts, assign, is_quantized, recipe_of, recipe_schemes
from moeconv.quantize.gguf.types import BY_DTYPE, LOADS, RUN, TYPES, UNUSUAL, fitting, scheme_of
from moeconv.quantize.spec import HARDWARE, MIXED, Asked, Format, Kernel


@dataclass(frozen=True)
class _Made:
    """A tensor of the file, or an expert's share of it, and the role of the source's tensor that it is made from."""

    tensor: GgufTensor
    role: Role

    @property
    def float32(self) -> bool:
        """Whether llama.cpp needs it in float32."""
        return is_float32(self.tensor.target, self.tensor.part.shape)


def gguf_shards(asked: Asked) -> tuple[tuple[Shard, ...], list[str]]:
    """(the files, warnings about tensors that are stored in another dtype than the scheme's).

    Raises InputError for a family, config, tokenizer or width that cannot be written to GGUF."""
    model, info = asked.model, GGUF.scheme(asked.scheme.name)
    row = find_row(model)
    made = _made(model, row)
    chosen = _whole(asked, row, made) if asked.whole else _packed(asked, made)
    columns = Columns(asked.imatrix, model.num_experts)
    stacks: dict[str, list[Item]] = {}
    for one in made:
        target = one.tensor.target
        kind = chosen.get(target) or ("F32" if one.float32 else asked.dtype or one.tensor.source.dtype)
        changed = one.role.group if target in chosen else ""
        stacks.setdefault(target, []).append(columns.weigh(one.tensor, one.tensor.item(kind, changed)))
    stacks |= {constant.name: [_constant(constant)] for constant in row.constants(model)}
    most = _most(asked, made, chosen) if asked.types else info.codes
    file_type = recipe_of(info.name).file_type if asked.whole else BY_DTYPE[most].file_type
    data, count, warnings = metadata(model, row, file_type=file_type)
    laid = [_stack(name, items) for name, items in stacks.items()]
    stem = stem_of(asked.name, MIXED if asked.types else info.name)
    shards = split(laid, stacks, metadata=data, count=count, size=asked.size, stem=stem)
    if not asked.whole:
        warnings = [*warnings, *_widened(_wanted(asked, made), chosen)]
    warnings = [*warnings, *columns.warnings()]
    return shards, warnings


def covered(model: Model) -> list[TensorRef]:
    """The weights of --scope all: those that llama-quantize quantizes."""
    tensors = model.checkpoint.tensors
    names = {one.tensor.source.tensor: None for one in _made(model, find_row(model)) if _is_covered(one)}
    return [tensors[name] for name in names]


def _is_covered(one: _Made) -> bool:
    return not one.float32 and is_quantized(one.tensor.target, one.tensor.part.shape)


def _made(model: Model, row: LlamaCpp) -> list[_Made]:
    """What the tensors of the source become, in the order of the file. The experts of a projection are in the order of
    their numbers, since they are one tensor."""
    ahead = model.prediction_layers
    kept = [name for name, role in model.roles.items() if role.layer not in ahead and role.group not in BESIDE]
    order = {name: i for i, name in enumerate(kept)}
    names = sorted(kept, key=lambda n: (_place(model, n, order), model.roles[n].expert or 0))
    pairs = ((model.checkpoint.tensors[name], model.roles[name]) for name in names)
    return [_Made(tensor, role) for ref, role in pairs for tensor in written(model, row, ref, role)]


def _wanted(asked: Asked, made: Sequence[_Made]) -> dict[str, str]:
    """The dtypes that were asked for, by the names of the packed tensors in the file."""
    weights = {ref.name for ref in asked.weights}
    found: dict[str, str] = {}
    for one in made:
        source, target = one.tensor.source.tensor, one.tensor.target
        if source in weights and not one.float32:
            scheme = asked.types.get(target) or asked.beside.get(source, asked.scheme).name
            found[target] = GGUF.scheme(scheme).codes
    return found


def _packed(asked: Asked, made: Sequence[_Made]) -> dict[str, str]:
    """The dtypes of the packed tensors, by their names in the file. Raises InputError for a width that no block format
    divides."""
    wanted = _wanted(asked, made)
    chosen: dict[str, str] = {}
    for one in made:
        source, columns = one.tensor.source.tensor, one.tensor.part.shape[-1]
        if one.tensor.target not in wanted:
            continue
        kind = fitting(wanted[one.tensor.target], columns)
        if kind == UNUSUAL:
            raise InputError(
                f"tensor {escape(source)!r} has {columns} columns, but GGUF needs a multiple of 32",
                hint="Use --format bitsandbytes.",
            )
        chosen[one.tensor.target] = kind
    return chosen


def _most(asked: Asked, made: Sequence[_Made], chosen: Mapping[str, str]) -> str:
    """The dtype that most of the weights with a type of their own have."""
    counts: dict[str, int] = {}
    for one in made:
        if one.tensor.target in asked.types:
            kind = chosen[one.tensor.target]
            counts[kind] = counts.get(kind, 0) + math.prod(one.tensor.part.shape)
    return max(counts, key=lambda kind: counts[kind])


def with_types(
    asked: Asked, offers: Sequence[Sequence[str]], importance: Mapping[int, float], options: QuantizeOptions
) -> Asked:
    """What is asked for with a scheme for each tensor of the experts, out of the first of the `offers` whose smallest
    schemes fit the budget. --max-bytes is a budget for the files, to the byte. Raises UsageError where none fits."""
    made = _made(asked.model, find_row(asked.model))
    _packed(asked, made)  # raises for widths that no type divides
    experts = asked.model.num_experts
    stacks = {one.tensor.target: one for one in made if one.role.group == "expert"}
    wanted = _wanted(asked, made)
    tensors = [
        MixedTensor(name, one.role.layer or 0, one.tensor.key, (experts, *one.tensor.part.shape))
        for name, one in stacks.items()
        if name in wanted
    ]
    weights = sum(math.prod(tensor.shape) for tensor in tensors)
    least = 0
    for names in offers:
        dtypes = [GGUF.scheme(name).codes for name in names]
        smallest = choose_types(tensors, dtypes, importance, 0).least
        beside = 0
        if options.max_bytes is not None:
            beside = _size(_typed(asked, choose_types(tensors, dtypes, importance, smallest))) - smallest
        budget = byte_budget(options, weights=weights, beside=beside)
        while (found := choose_types(tensors, dtypes, importance, budget)).chosen is not None:
            typed = _typed(asked, found)
            over = 0 if options.max_bytes is None else _size(typed) - parse_size(options.max_bytes, flag="--max-bytes")
            if over <= 0:
                return typed
            budget -= over
        least = smallest
    raise too_small(options, least, weights)


def _typed(asked: Asked, found: MixedTypes) -> Asked:
    assert found.chosen is not None
    return replace(asked, types={name: BY_DTYPE[dtype].name for name, dtype in found.chosen.items()})


def _size(asked: Asked) -> int:
    return sum(shard.nbytes for shard in gguf_shards(asked)[0])


def _whole(asked: Asked, row: LlamaCpp, made: Sequence[_Made]) -> dict[str, str]:
    """The dtypes of all tensors that the recipe of the scheme quantizes, by their names in the file."""
    model = asked.model
    shapes: dict[str, tuple[int, ...]] = {}
    for one in made:
        shape = one.tensor.part.shape
        if not one.float32:
            shapes[one.tensor.target] = shape if one.tensor.expert is None else (model.num_experts, *shape)
    numbers = hyperparameters(model, row)
    heads, kv_heads = (_first(numbers[f"attention.{key}"]) for key in ("head_count", "head_count_kv"))
    facts = Facts(
        row.arch, model.num_layers, model.num_experts, heads // kv_heads if kv_heads else 0, asked.imatrix is not None
    )
    recipe = recipe_of(asked.scheme.name)
    if recipe.needs_imatrix and asked.imatrix is None:
        raise UsageError(
            f"--scheme {recipe.name} needs an importance matrix",
            hint="Make one: moeconv calibrate MODEL --imatrix FILE --data TEXT; then pass --imatrix FILE.",
        )
    return assign(recipe, shapes, facts)


def _first(number: object) -> int:
    """The value of the first layer, where it differs by layer."""
    found = number[0] if isinstance(number, list) else number
    return found if isinstance(found, int) else 0


def _widened(wanted: Mapping[str, str], chosen: Mapping[str, str]) -> list[str]:
    """The warning about packed tensors that are stored in another type than was asked for."""
    other = [name for name, dtype in wanted.items() if chosen[name] != dtype]
    if not other:
        return []
    more = f" and {len(other) - 1} more" if len(other) > 1 else ""
    size = BLOCK_DTYPES[wanted[other[0]]][0]
    return [f"stored as {chosen[other[0]]}, because {size} does not divide their width: {other[0]}{more}"]


def _place(model: Model, name: str, order: dict[str, int]) -> int:
    """The position of a tensor in the file: that of the first tensor of its stack in the source."""
    role = model.roles[name]
    first = name if role.expert is None else model.family.name(role.key, layer=role.layer, expert=0)
    return order[first]


def _constant(constant: Constant) -> Item:
    spec = TensorSpec(constant.name, "F32", (len(constant.values),), "constant", 0)
    return Item((spec,), "constant", (), {"values": list(constant.values)})


def _stack(name: str, items: list[Item]) -> Stack:
    specs = [item.outputs[0] for item in items]
    shape = specs[0].shape if "#" not in specs[0].name else (len(specs), *specs[0].shape)
    if any((s.dtype, s.shape) != (specs[0].dtype, specs[0].shape) for s in specs):
        raise InputError(
            f"the tensors of {name} differ in shape or dtype", hint="All experts of a layer must have the same."
        )
    return Stack(name, specs[0].dtype, shape, tuple(s.name for s in specs))


GGUF = Format(
    "gguf",
    (*map(scheme_of, TYPES), *recipe_schemes()),
    notes={
        "transformers": "its gguf_file= reads experts wrongly (a Mixtral silently, as a dense Llama)",
        "vllm": "only with a plugin; not run",
        "llama.cpp": "run for every family that moeconv writes as GGUF",
    },
    kernels=(Kernel("gguf"),),
    hardware=HARDWARE,
    shard=gguf_shards,
    covers=covered,
    dense=True,
    takes=supported,
    mixes=MIXES,
    among=AMONG,
    mixed=LOADS,
    mixed_measured=RUN,
    mix=with_types,
    beside_loads=LOADS,
)
