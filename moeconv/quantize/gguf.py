"""--format gguf: one file for llama.cpp, which includes config and tokenizer. It is written expert by expert."""

from __future__ import annotations

from collections.abc import Iterable

from moeconv.checkpoint.gguf import GgufHead, Stack
from moeconv.checkpoint.header import BLOCK_DTYPES, FLOAT_DTYPES
from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.errors import InputError, escape
from moeconv.families.model import Model
from moeconv.plan.plan import Item, Shard, TensorSpec
from moeconv.quantize.gguf_metadata import metadata
from moeconv.quantize.llama_cpp import LLAMA_CPP, Constant, GgufTensor, find_row, is_float32, written
from moeconv.quantize.spec import Format, Kernel, Scheme, SchemeInfo

FILE_NAME = "model.gguf"
_FALLBACK = "Q8_0"


def gguf_shard(
    model: Model, weights: Iterable[TensorRef], scheme: Scheme, dtype: str | None
) -> tuple[Shard, list[str]]:
    """(the file, warnings about tensors that are stored in another dtype than `scheme`). `dtype` is that of the tensors
    that are not packed.

    Raises InputError for a family, config, tokenizer or width that cannot be written to GGUF."""
    row, block = find_row(model), GGUF.scheme(scheme.name).codes
    packed = {ref.name for ref in weights}
    if block in FLOAT_DTYPES:
        dtype = dtype or block  # of all matrices, also those that the scope leaves out
    stacks: dict[str, list[Item]] = {}
    widened: list[str] = []
    kept = [name for name, role in model.roles.items() if role.layer not in model.prediction_layers]
    order = {name: i for i, name in enumerate(kept)}
    # in the order of the experts, which are one tensor
    for name in sorted(kept, key=lambda n: (_place(model, n, order), model.roles[n].expert or 0)):
        ref, role = model.checkpoint.tensors[name], model.roles[name]
        for tensor in written(model, row, ref, role):
            kind = _dtype(tensor, block if name in packed else None, dtype)
            if name in packed and kind != block and tensor.target not in stacks:
                widened.append(f"{tensor.target} ({tensor.part.shape[-1]} columns)")
            changed = role.group if name in packed else ""
            stacks.setdefault(tensor.target, []).append(tensor.item(kind, changed))
    stacks |= {constant.name: [_constant(constant)] for constant in row.constants(model)}
    data, count, warnings = metadata(model, row, scheme=scheme.name)
    head = GgufHead(data, count, tuple(_stack(name, items) for name, items in stacks.items()))
    if widened:
        more = f" and {len(widened) - 1} more" if len(widened) > 1 else ""
        warnings.append(f"stored as {_FALLBACK}, because 256 does not divide their width: {widened[0]}{more}")
    return Shard(FILE_NAME, tuple(item for items in stacks.values() for item in items), head), warnings


def _place(model: Model, name: str, order: dict[str, int]) -> int:
    """The position of a tensor in the file: that of the first tensor of its stack in the source."""
    role = model.roles[name]
    first = name if role.expert is None else model.family.name(role.key, layer=role.layer, expert=0)
    return order[first]


def _dtype(tensor: GgufTensor, block: str | None, dtype: str | None) -> str:
    """The dtype of a tensor: `block` where it is packed and its width allows that, else `dtype` or the source's."""
    if is_float32(tensor.target, tensor.part.shape):
        return "F32"
    if block is None or block in FLOAT_DTYPES:
        return block or dtype or tensor.source.dtype
    columns = tensor.part.shape[-1]
    if columns % BLOCK_DTYPES[block][0] == 0:
        return block
    if columns % BLOCK_DTYPES[_FALLBACK][0] == 0:
        return _FALLBACK
    raise InputError(
        f"tensor {escape(tensor.source.tensor)!r} has {columns} columns, which the blocks of 32 of GGUF do not divide",
        hint="Use --format bitsandbytes.",
    )


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


# transformers 5.23, measured: a Mixtral's GGUF becomes a dense Llama with random FFNs, without an exception; for
# Qwen3-MoE it takes the default for the experts' width and refuses.
_LOADS = {"transformers": "no", "vllm": "unknown", "sglang": "unknown", "llama.cpp": "ok"}
_RUN: dict[str, dict[str, str]] = {"transformers": {}, "llama.cpp": {}}  # every family that it is written for

GGUF = Format(
    "gguf",
    (
        SchemeInfo("q4_k", 4, "Q4_K", _LOADS, limit=0.4, aliases=("q4_k_m", "q4_k_s"), measured=_RUN),
        SchemeInfo("q8_0", 8, "Q8_0", _LOADS, limit=0.05, aliases=("q8",), measured=_RUN),
        SchemeInfo("q4_0", 4, "Q4_0", _LOADS, limit=0.4, aliases=("q4",), measured=_RUN),
        SchemeInfo("f32", 32, "F32", _LOADS, limit=1e-6, measured=_RUN),
        SchemeInfo("f16", 16, "F16", _LOADS, limit=1e-2, measured=_RUN),
        SchemeInfo("bf16", 16, "BF16", _LOADS, limit=1e-2, measured=_RUN),
    ),
    notes={
        "transformers": "its gguf_file= reads experts wrongly (a Mixtral silently, as a dense Llama)",
        "vllm": "only by a plugin; not run",
        "llama.cpp": "run for every family that it is written for",
    },
    kernels=(Kernel("gguf"),),
    shard=gguf_shard,
    dense=True,
    takes=lambda family: family.model_type in LLAMA_CPP,
)
