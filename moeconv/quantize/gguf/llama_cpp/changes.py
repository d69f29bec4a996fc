"""How llama.cpp's rows change tensors, besides naming them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from moeconv.families.placement import Get
from moeconv.families.shapes import head_dim
from moeconv.quantize.gguf.llama_cpp.expression import Expression, join
from moeconv.quantize.gguf.llama_cpp.record import Change


def interleaved(get: Get, part: Expression) -> Mapping[str, Expression]:
    """The two halves of each head's rows alternate, as llama.cpp's rotary embedding for Llama needs them."""
    return {"": _alternating(part.reshape(-1, head_dim(get), *part.shape[1:])).reshape(*part.shape)}


def _alternating(heads: Expression) -> Expression:
    """The halves of the second axis, with alternating rows."""
    first, rows, *rest = heads.shape
    turned = heads.reshape(first, 2, rows // 2, *rest)
    return turned.permute(0, 2, 1, *range(3, 3 + len(rest))).reshape(*heads.shape)


def partly_interleaved(share: Callable[[Get], float]) -> Change:
    """The same where only the first rows of each head rotate."""

    def change(get: Get, part: Expression) -> Mapping[str, Expression]:
        head = head_dim(get)
        turning = int(head * share(get))
        heads = part.reshape(-1, head, *part.shape[1:])
        if turning == head:
            return interleaved(get, part)
        rotated, rest = heads.split(1, (turning, head - turning))
        return {"": join(1, (_alternating(rotated), rest)).reshape(*part.shape)}

    return change


LLAMA_ROTARY: dict[str, Change] = {f"attention.{key}": interleaved for key in ("q", "k", "q_bias", "k_bias")}


def plus_one(_get: Get, part: Expression) -> Mapping[str, Expression]:
    """1 is added, for norms whose class adds it."""
    return {"": part.add(1.0)}


def halves(first: str, second: str) -> Change:
    """The first half of the rows and the second half are tensors of their own."""

    def change(_get: Get, part: Expression) -> Mapping[str, Expression]:
        half = part.shape[0] // 2
        return {first: part.cut(0, 0, half), second: part.cut(0, half, 2 * half)}

    return change


def heads_in_rows(names: tuple[str, ...], sizes: Callable[[Get], list[int]]) -> Change:
    """Consecutive rows are tensors of their own: queries, keys and values, for example."""

    def change(get: Get, part: Expression) -> Mapping[str, Expression]:
        return dict(zip(names, part.split(0, sizes(get)), strict=True))

    return change


def without_middle_axis(_get: Get, part: Expression) -> Mapping[str, Expression]:
    """[channels, 1, kernel] becomes [channels, kernel]."""
    return {"": part.reshape(part.shape[0], part.shape[-1])}
