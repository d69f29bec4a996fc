"""What a quantization format is: a number format, a layout on disk, what config.json says, and who loads it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moeconv.checkpoint.reader import TensorRef
from moeconv.families.model import Model
from moeconv.plan.build import whole
from moeconv.plan.plan import Item, Shard, TensorSpec


@dataclass(frozen=True, slots=True)
class Scheme:
    """A number format. `group` is weights per scale, None for one scale a row."""

    name: str
    bits: int
    group: int | None = None
    nested: bool = False  # bitsandbytes' double quantization: the scales are quantized too


@dataclass(frozen=True, slots=True)
class Format:
    """A layout on disk. `make(ref, scheme, role)` plans one weight; `config(scheme, ignore, dtype, scope)` is
    quantization_config. A format that is a file of its own has `shard(model, weights, scheme, dtype)` instead.
    """

    name: str
    schemes: tuple[str, ...]  # the first of a width is what --bits means
    grouped: bool
    loads: Mapping[str, Mapping[str, str]]  # scheme -> runtime -> ok | dequantized | no | unknown
    mixed: Mapping[str, str]  # the same for bits that differ by layer
    notes: Mapping[str, str]  # runtime -> what one should know
    make: Callable[[TensorRef, Scheme, str], Item] | None = None
    config: Callable[[Scheme, Sequence[str], str, str], dict[str, Any]] | None = None
    shard: Callable[[Model, Iterable[TensorRef], Scheme, str | None], tuple[Shard, list[str]]] | None = None
    remote_code: bool = False  # whether its loader can be written beside the weights
    nests: tuple[str, ...] = ()  # schemes that double quantization goes with
    stack: Callable[[TensorRef, Scheme, str, int], list[Item]] | None = None  # `make` for all experts in one tensor


def codes(
    ref: TensorRef, kernel: str, parts: Sequence[tuple[str, str, str, tuple[int, ...]]], role: str, **params: Any
) -> Item:
    """An item of one weight: `parts` are (suffix, name that the kernel gives it, dtype, shape); the first has codes."""
    numel, stem = math.prod(ref.shape), ref.name.removesuffix(".weight")
    specs = tuple(
        TensorSpec(stem + suffix, dtype, shape, role, numel if i == 0 else 0)
        for i, (suffix, _, dtype, shape) in enumerate(parts)
    )
    return Item(specs, kernel, (whole(ref),), {"parts": [p[1] for p in parts], **params}, role.partition(".")[0])
