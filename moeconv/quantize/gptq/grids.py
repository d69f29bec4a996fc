"""From a planned item to the grid that its codes lie on, and from chosen codes to the item's tensors as on disk."""

from __future__ import annotations

import torch
from torch import Tensor

from moeconv.plan.kernels.chain import last_stage
from moeconv.plan.kernels.pack import pack_nf4, pack_words
from moeconv.plan.kernels.stored import TORCH_DTYPES
from moeconv.plan.plan import Item
from moeconv.quantize.gptq.matrix import Coded, Grid


def grid_of(item: Item) -> tuple[Grid, int]:
    """The levels that an item's codes stand for, and the weights that share a scale."""
    item = last_stage(item)
    width = item.inputs[0].shape[1]
    if item.kernel == "pack_int":
        half = 1 << (item.params["bits"] - 1)
        scale = next(s for s, part in zip(item.outputs, item.params["parts"]) if part == "weight_scale")
        levels = torch.arange(-half, half, dtype=torch.float32)
        return Grid(levels, half - 0.5, TORCH_DTYPES[scale.dtype]), item.params["group_size"] or width
    if item.kernel == "pack_bnb8":
        return Grid(torch.arange(-127.0, 128.0), 127.0, torch.float32), width
    values = _empty_4bit(item)["quant_map"]
    return Grid(values.sort().values, 1.0, torch.float32), item.params["block_size"]


def _empty_4bit(item: Item) -> dict[str, Tensor]:
    """The parts of a zero weight: a map and a state that the codes do not change."""
    ref = item.inputs[0]
    weight = torch.zeros(ref.shape, dtype=TORCH_DTYPES[ref.dtype])
    return pack_nf4(weight, block_size=item.params["block_size"], quant_type=item.params["quant_type"])


def on_disk(item: Item, coded: Coded) -> dict[str, Tensor]:
    """The item's output tensors, by name, that decode to `coded`."""
    item = last_stage(item)
    levels, scales = coded.levels.cpu(), coded.scales.cpu()
    parts: dict[str, Tensor] = {}
    if item.kernel == "pack_int":
        parts["weight_packed"] = pack_words(levels.to(torch.int8), bits=item.params["bits"])
        parts["weight_scale"] = scales
        parts["weight_shape"] = torch.tensor(levels.shape)
    elif item.kernel == "pack_bnb8":
        parts |= {"": levels.to(torch.int8), "SCB": scales.flatten() * 127}
    else:
        parts |= _empty_4bit(item)
        values, order = parts["quant_map"].sort(stable=True)
        codes = order[torch.searchsorted(values, levels.flatten().contiguous())].to(torch.uint8)
        parts |= {"": (codes[::2] << 4) | codes[1::2], "absmax": scales.flatten()}
    return {
        spec.name: parts[part].to(TORCH_DTYPES[spec.dtype]).view(spec.shape)
        for spec, part in zip(item.outputs, item.params["parts"], strict=True)
    }
