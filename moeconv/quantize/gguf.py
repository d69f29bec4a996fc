"""--format gguf: one file for llama.cpp, which includes config and tokenizer. It is written expert by expert."""

from __future__ import annotations

import math
from collections.abc import Iterable

from moeconv.checkpoint.gguf import GgufHead, Stack
from moeconv.checkpoint.header import BLOCK_DTYPES
from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.errors import InputError, escape
from moeconv.families.model import Model
from moeconv.families.spec import Role
from moeconv.plan.build import whole
from moeconv.plan.plan import Item, Shard, TensorSpec
from moeconv.quantize.gguf_metadata import metadata
from moeconv.quantize.llama_cpp import FLOAT32, LLAMA_CPP, LlamaCpp, find_row, tensor_name
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
    stacks: dict[str, list[TensorSpec]] = {}
    items: list[Item] = []
    widened: list[str] = []
    kept = [name for name, role in model.roles.items() if role.layer not in model.prediction_layers]
    order = {name: i for i, name in enumerate(kept)}
    # the experts of a projection are adjacent, since they are one tensor
    names = sorted(kept, key=lambda n: (_place(model, n, order), model.roles[n].expert or 0))
    for name in names:
        ref, role = model.checkpoint.tensors[name], model.roles[name]
        target = tensor_name(row, role)
        kind = _dtype(ref, role, block if name in packed else None, dtype)
        if name in packed and kind != block and target not in stacks:
            widened.append(f"{target} ({ref.shape[1]} columns)")
        part = target if role.expert is None else f"{target}#{role.expert}"
        spec = TensorSpec(part, kind, ref.shape, role.key, math.prod(ref.shape))
        stacks.setdefault(target, []).append(spec)
        items.append(_item(model, row, ref, role, spec, packed=name in packed))
    data, count, warnings = metadata(model, row, scheme=scheme.name)
    head = GgufHead(data, count, tuple(_stack(name, specs) for name, specs in stacks.items()))
    if widened:
        more = f" and {len(widened) - 1} more" if len(widened) > 1 else ""
        warnings.append(f"stored as {_FALLBACK}, because 256 does not divide their width: {widened[0]}{more}")
    return Shard(FILE_NAME, tuple(items), head), warnings


def _place(model: Model, name: str, order: dict[str, int]) -> int:
    """The position of a tensor in the file: that of the first tensor of its stack in the source."""
    role = model.roles[name]
    first = name if role.expert is None else model.family.name(role.key, layer=role.layer, expert=0)
    return order[first]


def _dtype(ref: TensorRef, role: Role, block: str | None, dtype: str | None) -> str:
    if block is not None:
        if ref.shape[-1] % BLOCK_DTYPES[block][0] == 0:
            return block
        if ref.shape[-1] % BLOCK_DTYPES[_FALLBACK][0] == 0:
            return _FALLBACK
        raise InputError(
            f"tensor {escape(ref.name)!r} has {ref.shape[-1]} columns, which the blocks of 32 of GGUF do not divide",
            hint="Use --format bitsandbytes.",
        )
    wide = len(ref.shape) == 1 or role.key.startswith(FLOAT32)
    return "F32" if wide else dtype or ref.dtype


def _item(model: Model, row: LlamaCpp, ref: TensorRef, role: Role, spec: TensorSpec, *, packed: bool) -> Item:
    heads = 0
    if row.interleaved and role.key.removesuffix("_bias") in ("attention.q", "attention.k"):
        count = model.value("num_attention_heads")
        heads = count if role.key.startswith("attention.q") else model.value("num_key_value_heads") or count
    changed = role.group if packed else ""
    if spec.dtype == ref.dtype and not heads:
        return Item((spec,), "copy", (whole(ref),), {}, changed)
    return Item((spec,), "gguf", (whole(ref),), {"heads": heads}, changed)


def _stack(name: str, specs: list[TensorSpec]) -> Stack:
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
    ),
    notes={
        "transformers": "its gguf_file= reads experts wrongly (a Mixtral silently, as a dense Llama)",
        "vllm": "only by a plugin; not run",
        "llama.cpp": "run for every family that it is written for",
    },
    kernels=(Kernel("gguf"),),
    shard=gguf_shard,
    takes=lambda family: family.model_type in LLAMA_CPP,
)
