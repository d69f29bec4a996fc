"""The parameters that train, and their tensors on disk: one fused parameter corresponds to many tensors there.

The pieces of a parameter follow the layout of the Hub: gate, up and down of each expert, [I, H], [I, H] and [H, I]. A
parameter may be sharded over processes (FSDP2); each process then works on its own rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeconv.errors import InputError, escape
from moeconv.families.model import Model
from moeconv.families.spec import Role
from moeconv.plan.kernels.stored import TORCH_DTYPES
from moeconv.stream.skeleton import Stock
from moeconv.tune.routing import Block
from moeconv.tune.words import BIAS, tensors_of, word_of


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor on disk and the part of a parameter that corresponds to it. The part holds the values divided by
    `scale`, a power of two. `word` is the word of --train that makes the tensor trainable."""

    name: str
    dtype: str
    word: str
    parameter: Tensor
    at: tuple[int | slice, ...] = ()
    scale: float = 1.0


def pieces_of(
    model: Model, train: tuple[str, ...], *, blocks: Iterable[Block], named: Mapping[str, nn.Parameter],
    layer: int | None = None,
) -> list[Piece]:  # fmt: skip
    """The pieces of everything that trains, in one layer or in all: parts of `blocks`, and `named` parameters by their
    name on disk.

    Raises InputError for a tensor that is fused with others in memory, so that it cannot be trained alone.
    """
    by_layer = {block.layer: block for block in blocks}
    pieces = []
    for name in tensors_of(model, train):
        role = model.roles[name]
        if layer is not None and role.layer != layer:
            continue
        word, dtype = word_of(role), model.checkpoint.tensors[name].dtype
        if word == BIAS and role.layer is not None:
            bias = by_layer[role.layer].bias
            assert bias is not None
            pieces.append(Piece(name, dtype, BIAS, bias))
        elif word in ("router", "experts") and role.layer is not None:
            block = by_layer[role.layer]
            scale = block.scale if word == "router" else 1.0
            pieces.append(Piece(name, dtype, word, *_within(block, role), scale=scale))
        elif name in named:
            pieces.append(Piece(name, dtype, str(word), named[name]))
        else:
            raise InputError(
                f"{escape(name)!r} cannot be trained alone, because transformers fuses it with other tensors",
                hint=f"Leave {word} out of --train.",
            )
    return pieces


def _within(block: Block, role: Role) -> tuple[Tensor, tuple[int | slice, ...]]:
    """(a parameter of a block, the part of it that is the tensor of this role)."""
    part = role.key.partition(".")[2]
    if role.group == "router":
        return block.router.weight, ()
    if part == "down":
        assert role.expert is not None
        return block.experts.down_proj, (role.expert,)
    half = block.experts.gate_up_proj.shape[1] // 2
    assert role.expert is not None
    return block.experts.gate_up_proj, (role.expert, slice(0, half) if part == "gate" else slice(half, 2 * half))


def parameters_by_word(pieces: Iterable[Piece]) -> dict[str, list[Tensor]]:
    """{word of --train: its parameters that have a gradient}, each parameter once."""
    groups: dict[str, dict[int, Tensor]] = {}
    for piece in pieces:
        if piece.word != BIAS:
            groups.setdefault(piece.word, {})[id(piece.parameter)] = piece.parameter
    return {word: list(found.values()) for word, found in groups.items()}


# -- values as they will be written ----------------------------------------------------------------------------------


def sharded(parameter: Tensor) -> bool:
    """Whether each process holds a part of the parameter."""
    return hasattr(parameter, "to_local")


def own(parameter: Tensor) -> Tensor:
    """The rows of a parameter that this process holds (all rows, unless it is sharded), as a view without a
    gradient."""
    value: Stock = parameter.detach()
    return value.to_local() if sharded(value) else value


def _by_parameter(pieces: Iterable[Piece]) -> Iterator[tuple[Tensor, list[Piece]]]:
    found: dict[int, list[Piece]] = {}
    for piece in pieces:
        found.setdefault(id(piece.parameter), []).append(piece)
    for of_one in found.values():
        yield of_one[0].parameter, of_one


def _dtype(pieces: Iterable[Piece]) -> torch.dtype | None:
    """The dtype on disk of all pieces of a parameter; None if they differ."""
    dtypes = {TORCH_DTYPES[piece.dtype] for piece in pieces}
    return dtypes.pop() if len(dtypes) == 1 else None


def snapshot(pieces: Iterable[Piece]) -> list[Tensor]:
    """A copy of what this process holds of every parameter, for `restore`. Values are rounded to the dtype on disk if
    all pieces of the parameter have the same."""
    return [own(p).to(_dtype(found) or p.dtype, copy=True) for p, found in _by_parameter(pieces)]


def exact(pieces: Iterable[Piece]) -> list[Tensor]:
    """A copy as `snapshot` makes it, but not rounded."""
    return [own(p).clone() for p, _ in _by_parameter(pieces)]


def restore(pieces: Iterable[Piece], values: Sequence[Tensor]) -> None:
    """Put the values of a snapshot into the parameters."""
    for (parameter, _), value in zip(_by_parameter(pieces), values, strict=True):
        own(parameter).copy_(value)


def round_in_place(pieces: Iterable[Piece]) -> None:
    """Round every piece to the value that it will have on disk. Raises InputError for a sharded parameter whose pieces
    have several dtypes there."""
    for parameter, found in _by_parameter(pieces):
        value, dtype = own(parameter), _dtype(found)
        if dtype is not None:
            value.copy_(value.to(dtype))
        elif sharded(parameter):
            raise InputError(
                f"{escape(found[0].name)} and the tensors that are fused with it have several dtypes, which several "
                "processes cannot train",
                hint="Tune the model in one process, or convert it to one dtype first.",
            )
        else:
            for piece in found:
                value[piece.at].copy_(value[piece.at].to(TORCH_DTYPES[piece.dtype]))


def written(pieces: Iterable[Piece]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor in the dtype on disk) of every piece. Sharded parameters are gathered one by one, so that all
    processes must iterate."""
    for parameter, found in _by_parameter(pieces):
        value: Stock = parameter.detach()
        whole = value.full_tensor() if sharded(value) else value
        for piece in found:
            value = whole[piece.at] if piece.scale == 1 else whole[piece.at] * piece.scale
            yield piece.name, value.to(TORCH_DTYPES[piece.dtype])
