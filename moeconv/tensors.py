"""A model's weights as torch tensors, however they are stored on disk.

Imports torch: only the measuring commands import this module, and those lazily.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from moeconv.checkpoint.reader import Checkpoint
from moeconv.families.model import Model
from moeconv.families.packed import weight_of
from moeconv.families.spec import BESIDE, UNCHANGED, Role
from moeconv.plan.kernels import Buffer, load_kernel
from moeconv.plan.kernels.chain import between, gathered
from moeconv.plan.kernels.decode import decode_parts
from moeconv.plan.kernels.stored import to_tensor
from moeconv.plan.plan import Input, Item


def read_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """Tensor `name` as it is stored, in memory of its own."""
    ref = checkpoint.tensors[name]
    return to_tensor(checkpoint.read(name), ref.dtype, ref.shape)


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite. Takes no memory (FP8: that of a copy), unlike `isfinite`, which
    copies the values."""
    if values.is_floating_point() and values.element_size() == 1:  # torch finds no extremes of FP8
        values = values.float()
    return not values.numel() or all(bool(end.isfinite()) for end in torch.aminmax(values))


def plain_names(model: Model, *, beside: bool = False) -> Iterator[tuple[str, int | None]]:
    """Every tensor of the unquantized model, by name, with its layer: a packed weight's parts count once, and
    multi-token-prediction layers are left out, as the stock classes leave them out; so is what lies beside the
    language model, unless `beside` asks for it."""
    seen: set[str] = set()
    for name, role in model.roles.items():
        if role.layer is not None and role.layer >= model.num_layers:
            continue
        if role.group in BESIDE and not beside:
            continue
        plain = plain_name(name, role)
        if plain not in seen:
            seen.add(plain)
            yield plain, role.layer


def plain_name(name: str, role: Role) -> str:
    """The name that a stored tensor has in the unquantized model."""
    return weight_of(name) if role.part else name


def read_parts(model: Model, name: str) -> dict[str, Tensor]:
    """The stored tensors behind plain tensor `name`, by what each is of it: "weight" alone where it is not packed.

    Raises KeyError when the checkpoint has nothing of that name.
    """
    stored = model.stored.get(name)
    parts = {"weight": name} if stored is None else stored.parts
    return {part: read_tensor(model.checkpoint, tensor) for part, tensor in parts.items()}


def decode_read(model: Model, name: str, parts: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """The float tensor from what `read_parts` gave for plain name `name`; a tensor that every command copies unchanged
    may hold whole numbers."""
    stored, role = model.stored.get(name), model.roles.get(name)
    if role is not None and role.group in UNCHANGED and not parts["weight"].is_floating_point():
        return parts["weight"]
    return decode_parts(parts, name=name, how=None if stored is None else stored.how, dtype=dtype)


def packed_source(checkpoint: Checkpoint, item: Item) -> Tensor:
    """The matrix that a packing item of a plan packs, as its kernel is given it: of the plan's source, decoded or cast
    where the plan does that first."""
    read: list[tuple[Input, Buffer]] = [
        (ref, checkpoint.read(ref.tensor, start=ref.start, length=ref.nbytes) if ref.origin == "source" else b"")
        for ref in item.inputs
    ]
    kernel, params = item.kernel, item.params
    while kernel in ("chain", "gather"):
        read = [between(read, params)] if kernel == "chain" else gathered(read, params)
        kernel, params = params["then"]["kernel"], params["then"]["params"]
    if kernel == "compute":  # its output is the matrix, in a float dtype
        spec = item.outputs[0]._replace(dtype="F32")
        (data,) = load_kernel(kernel)(read, (spec,), params)
        return to_tensor(memoryview(data), spec.dtype, spec.shape)
    ref, data = read[0]  # the others are weights that share its scale, or importance
    return to_tensor(memoryview(data), ref.dtype, ref.shape)


def read_rows(model: Model, name: str, first: int, stop: int, *, of: int) -> dict[str, Tensor]:
    """Rows `first` to `stop` of the stored tensors behind plain tensor `name`, each of which has `of` rows. Keys are
    those of `read_parts`."""
    checkpoint, stored = model.checkpoint, model.stored.get(name)
    found: dict[str, Tensor] = {}
    for part, tensor in ({"weight": name} if stored is None else stored.parts).items():
        ref = checkpoint.tensors[tensor]
        row = ref.nbytes // of
        data = checkpoint.read(ref.name, start=first * row, length=(stop - first) * row)
        found[part] = to_tensor(data, ref.dtype, (stop - first, *ref.shape[1:]))
    return found


def decode_weight(model: Model, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """The float weight of plain name `name` (`...down_proj.weight`), also when it is stored packed."""
    return decode_read(model, name, read_parts(model, name), dtype)
