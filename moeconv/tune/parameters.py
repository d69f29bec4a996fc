"""Which parameters train, and their tensors as they lie on disk: one fused parameter is many tensors there.

The pieces of a parameter are cut in the Hub's layout: gate, up and down of each expert, [I, H], [I, H] and [H, I].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moeconv.errors import InputError, UsageError, escape
from moeconv.families.model import Model
from moeconv.families.spec import Role
from moeconv.options import did_you_mean
from moeconv.tensors import TORCH_DTYPES
from moeconv.tune.routing import Block

WORDS = ("router", "experts", "shared", "norms")


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor on disk and the part of a parameter that holds it. `word` is the word of --train that opens it."""

    name: str
    dtype: str
    word: str
    parameter: nn.Parameter
    at: tuple[Any, ...] = ()

    def value(self) -> Tensor:
        """A view of the parameter, in its own dtype."""
        return self.parameter.detach()[self.at]


def parse_train(text: str) -> tuple[str, ...]:
    """`router,experts` -> words in the order of WORDS. Raises UsageError."""
    words = {w.strip() for w in text.split(",")}
    for word in words:
        if word not in WORDS:
            raise UsageError(f"--train {escape(text)}: unknown word {escape(word)!r}", hint=did_you_mean(word, WORDS))
    return tuple(w for w in WORDS if w in words)


def word_of(role: Role) -> str | None:
    """The word of --train that opens a tensor, None for one that never trains: a router's correction bias has no
    gradient, the balance of the load moves it."""
    if role.group == "router" and role.key != "router.weight":
        return None
    return {"router": "router", "expert": "experts", "shared": "shared", "norm": "norms"}.get(role.group)


def tensors_of(model: Model, train: tuple[str, ...]) -> list[str]:
    """Names on disk of everything that trains, in the checkpoint's order."""
    return [name for name in model.checkpoint.tensors if name in model.roles and word_of(model.roles[name]) in train]


def pieces_of(
    model: Model, train: tuple[str, ...], *, blocks: Iterable[Block], named: Mapping[str, nn.Parameter],
    layer: int | None = None,
) -> list[Piece]:  # fmt: skip
    """The pieces of everything that trains, in one layer or all: of `blocks`, and of `named` by name on disk.

    Raises InputError for a tensor that is joined with others in memory.
    """
    by_layer = {block.layer: block for block in blocks}
    pieces = []
    for name in tensors_of(model, train):
        role = model.roles[name]
        if layer is not None and role.layer != layer:
            continue
        word, dtype = word_of(role), model.checkpoint.tensors[name].dtype
        if word in ("router", "experts") and role.layer is not None:
            pieces.append(Piece(name, dtype, word, *_within(by_layer[role.layer], role)))
        elif name in named:
            pieces.append(Piece(name, dtype, str(word), named[name]))
        else:
            raise InputError(f"{escape(name)!r} cannot be trained alone", hint=f"Leave {word} out of --train.")
    return pieces


def _within(block: Block, role: Role) -> tuple[nn.Parameter, tuple[Any, ...]]:
    part = role.key.partition(".")[2]
    if role.group == "router":
        return block.router.weight, ()
    if part == "down":
        return block.experts.down_proj, (role.expert,)
    half = block.experts.gate_up_proj.shape[1] // 2
    return block.experts.gate_up_proj, (role.expert, slice(0, half) if part == "gate" else slice(half, 2 * half))


def parameters_by_word(pieces: Iterable[Piece]) -> dict[str, list[nn.Parameter]]:
    """Each parameter once, under the word that opens it."""
    groups: dict[str, dict[int, nn.Parameter]] = {}
    for piece in pieces:
        groups.setdefault(piece.word, {})[id(piece.parameter)] = piece.parameter
    return {word: list(found.values()) for word, found in groups.items()}


# -- values as they will be written ----------------------------------------------------------------------------------


def snapshot(pieces: Iterable[Piece]) -> dict[str, Tensor]:
    """Every piece in the dtype that it will be written in."""
    return {p.name: p.value().to(TORCH_DTYPES[p.dtype], copy=True) for p in pieces}


def restore(pieces: Iterable[Piece], values: Mapping[str, Tensor]) -> None:
    """Put the values of a snapshot into the parameters."""
    for piece in pieces:
        piece.value().copy_(values[piece.name])
