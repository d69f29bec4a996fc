"""The grid of codes that a planned item has, and the item's tensors on disk for chosen codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from moeconv.checkpoint.reader import Checkpoint
from moeconv.errors import UsageError
from moeconv.plan.flow import make
from moeconv.plan.kernels import Buffer
from moeconv.plan.kernels.chain import last_stage
from moeconv.plan.kernels.pack import pack_nf4, pack_words
from moeconv.plan.kernels.pack.levels import Coded, Grid
from moeconv.plan.kernels.stored import TORCH_DTYPES, to_tensor
from moeconv.plan.plan import Item
from moeconv.quantize.formats import kernel_of


@dataclass(frozen=True)
class CodeGrid:
    """How data chooses the codes of a kernel. The record of the kernel names it (`quantize.spec.Kernel.grid`). Both
    functions take an item of that kernel. `grid` returns the levels that the codes stand for, and the number of weights
    per scale. `parts` returns the tensors under the kernel's names."""

    grid: Callable[[Item], tuple[Grid, int]]
    parts: Callable[[Item, Coded], dict[str, Tensor]]


def grid_of(item: Item) -> tuple[Grid, int]:
    """(levels that an item's codes stand for, weights per scale)."""
    item = last_stage(item)
    return _code_grid(item).grid(item)


def on_disk(item: Item, coded: Coded) -> dict[str, Tensor]:
    """The item's output tensors by name for one matrix: a reader decodes them to `coded`."""
    item = last_stage(item)
    coded = Coded(coded.levels.cpu(), coded.scales.cpu(), None if coded.unit is None else coded.unit.cpu())
    parts = _code_grid(item).parts(item, coded)
    return {
        spec.name: parts[part].to(TORCH_DTYPES[spec.dtype]).view(spec.shape)
        for spec, part in zip(item.outputs, item.params["parts"], strict=True)
    }


def nearest_on_disk(item: Item, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The item's output tensors by name as round-to-nearest writes them, computed by the item's own kernel."""
    return as_planned(replace(item, params=_unfitted(item.params)), checkpoint)


def as_planned(item: Item, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The item's output tensors by name, as the plan makes them."""
    return by_name(item, make(item, {"source": checkpoint}))


def by_name(item: Item, made: Sequence[Buffer]) -> dict[str, Tensor]:
    """What a kernel made, as the item's output tensors by name."""
    return {
        spec.name: to_tensor(memoryview(bytearray(data)), spec.dtype, spec.shape)
        for spec, data in zip(item.outputs, made, strict=True)
    }


def _unfitted(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a packing kernel without the fit of its scales, also if it is the last kernel of a chain."""
    plain = {key: value for key, value in params.items() if key != "fit"}
    if "then" in plain:
        plain["then"] = plain["then"] | {"params": _unfitted(plain["then"]["params"])}
    return plain


def _code_grid(item: Item) -> CodeGrid:
    kernel = kernel_of(item.kernel)
    if kernel is None or not kernel.grid:
        raise UsageError(f"the kernel {item.kernel} does not support --method gptq", hint="Use --method rtn.")
    module, _, name = kernel.grid.partition(":")
    grid: CodeGrid = getattr(import_module(module), name)
    return grid


# -- integers of compressed-tensors: one scale per group of a row ------------------------------------------------------


def _integer_grid(item: Item) -> tuple[Grid, int]:
    half = 1 << (item.params["bits"] - 1)
    scale = next(s for s, part in zip(item.outputs, item.params["parts"]) if part == "weight_scale")
    grid = _integers(-half, half, half - 0.5, TORCH_DTYPES[scale.dtype])
    return grid, item.params["group_size"] or item.inputs[0].shape[1]


@lru_cache
def _integers(low: int, stop: int, top: float, dtype: torch.dtype) -> Grid:
    return Grid(torch.arange(low, stop, dtype=torch.float32), top, dtype)


def _integer_parts(item: Item, coded: Coded) -> dict[str, Tensor]:
    return {
        "weight_packed": pack_words(coded.levels.to(torch.int8), bits=item.params["bits"]),
        "weight_scale": coded.scales,
        "weight_shape": torch.tensor(coded.levels.shape),
    }


# -- LLM.int8: one scale per row ---------------------------------------------------------------------------------------


def _rowwise_grid(item: Item) -> tuple[Grid, int]:
    return _integers(-127, 128, 127.0, torch.float32), item.inputs[0].shape[1]


def _rowwise_parts(_: Item, coded: Coded) -> dict[str, Tensor]:
    return {"": coded.levels.to(torch.int8), "SCB": coded.scales.flatten() * 127}


# -- 4 bits of bitsandbytes: one scale per block, values from a map ----------------------------------------------------


def _four_bit_grid(item: Item) -> tuple[Grid, int]:
    return _map_grid(item.params["quant_type"]), item.params["block_size"]


@lru_cache
def _map_grid(quant_type: str) -> Grid:
    values = pack_nf4(torch.zeros(1, 64), quant_type=quant_type)["quant_map"]
    return Grid(values.sort().values, 1.0, torch.float32)


def _four_bit_parts(item: Item, coded: Coded) -> dict[str, Tensor]:
    ref = item.inputs[0]
    parts = _empty_4bit(tuple(ref.shape), ref.dtype, item.params["block_size"], item.params["quant_type"])
    values, order = parts["quant_map"].sort(stable=True)
    codes = order[torch.searchsorted(values, coded.levels.flatten().contiguous())].to(torch.uint8)
    return parts | {"": (codes[::2] << 4) | codes[1::2], "absmax": coded.scales.flatten()}


@lru_cache(maxsize=16)
def _empty_4bit(shape: tuple[int, ...], dtype: str, block_size: int, quant_type: str) -> dict[str, Tensor]:
    """The parts of a zero weight. Its map and its state are the same for all codes."""
    return pack_nf4(torch.zeros(shape, dtype=TORCH_DTYPES[dtype]), block_size=block_size, quant_type=quant_type)


INTEGER = CodeGrid(_integer_grid, _integer_parts)
ROWWISE = CodeGrid(_rowwise_grid, _rowwise_parts)
FOUR_BIT = CodeGrid(_four_bit_grid, _four_bit_parts)
