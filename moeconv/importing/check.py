"""Whether a planned import is the model of the file: the rows of quantize/gguf/llama_cpp, applied to it, must give the
tensors, the constants and every hyperparameter of the file again."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from moeconv.checkpoint.gguf_source import GgufSource
from moeconv.errors import InputError, Unsupported, escape
from moeconv.families.model import Model
from moeconv.importing.flags import check_flags
from moeconv.quantize.gguf.llama_cpp import Constant, LlamaCpp, find_row, written
from moeconv.quantize.gguf.llama_cpp.numbers import hyperparameters

_CLOSE = 1e-5  # some programs compute constants in float32
# keys that files may leave out: llama.cpp then uses the value that the row has, or one that follows from the shapes
_ASSUMED = frozenset({
    "attention.key_length", "attention.value_length", "vocab_size", "rope.dimension_count", "rope.freq_base",
    "expert_feed_forward_length", "expert_shared_feed_forward_length", "expert_gating_func",
    "leading_dense_block_count",
    "rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
})  # fmt: skip
# other keys -> values with which llama.cpp computes the same as without the key; None: it does not read the key
_INERT: dict[str, tuple[object, ...] | None] = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0, 1),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.finetuned": None,
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "nextn_predict_layers": (0,),
}
_ORIGINAL = "Use the original model, or download the file again if it may be damaged."


def check_import(source: GgufSource, model: Model) -> None:
    """Raises InputError unless the model, written by the rows, has the tensors and the hyperparameters of the file."""
    row = find_row(model)
    check_flags(model)
    _check_shapes(source, model, row)
    for constant in row.constants(model):
        _check_constant(source, constant)
    _check_keys(source, row.arch, hyperparameters(model, row))


def _check_shapes(source: GgufSource, model: Model, row: LlamaCpp) -> None:
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
            raise InputError(f"{escape(name)} should be {list(expected)}, but the file has {has}", hint=_ORIGINAL)
    if stray := sorted(set(source.tensors) - set(shapes)):
        raise Unsupported(f"tensor {escape(stray[0])!r} has no place in this family", hint=_ORIGINAL)


def _check_constant(source: GgufSource, constant: Constant) -> None:
    ref = source.tensors[constant.name]
    if ref.dtype != "F32":
        raise Unsupported(f"{escape(ref.name)} is {ref.dtype}, but only F32 can be compared", hint=_ORIGINAL)
    data = bytearray(ref.nbytes)
    source.read_into(ref.name, memoryview(data))
    values = np.frombuffer(data, "<f4")
    if not np.allclose(values, np.asarray(constant.values), rtol=_CLOSE, atol=0):
        raise Unsupported(f"the values of {escape(ref.name)} are not those of a published scaling", hint=_ORIGINAL)


def _check_keys(source: GgufSource, arch: str, needed: Mapping[str, object]) -> None:
    """Raises Unsupported for a hyperparameter that the model does not have, or has with another value."""
    stated = {
        key.removeprefix(f"{arch}."): value for key, value in source.metadata.items() if key.startswith(f"{arch}.")
    }
    for key, value in needed.items():
        if key not in stated and value and key not in _ASSUMED:
            raise Unsupported(f"the file has no {arch}.{key}, but the model needs {escape(value)}", hint=_ORIGINAL)
        if key in stated and not _equal(stated[key], value):
            raise Unsupported(
                f"{arch}.{key} is {escape(stated[key])}, but the model that moeconv would write has {escape(value)}",
                hint=_ORIGINAL,
            )
    for key in sorted(set(stated) - set(needed)):
        allowed = _INERT.get(key, ())
        if allowed is not None and not any(_equal(stated[key], value) for value in allowed):
            raise Unsupported(f"{arch}.{escape(key)} = {escape(stated[key])} is not imported", hint=_ORIGINAL)


def _equal(one: object, other: object) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(_equal(a, b) for a, b in zip(one, other))
    if isinstance(one, bool) != isinstance(other, bool):
        return False
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other
