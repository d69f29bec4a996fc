"""LLM.int8: one scale per row, with the bytes of `int8_vectorwise_quant` of bitsandbytes on the CPU."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moeconv.plan.kernels.pack.common import BLOCK, ROUND, RowBuffers, check_finite, check_matrix

_INT8_TO_UNIT = 7.874015718698502e-3  # 1 / 127 as written in bitsandbytes (int8_vectorwise_dequant)


def pack_int8_rowwise(weight: Tensor) -> dict[str, Tensor]:
    """LLM.int8 row-wise (arXiv 2208.07339), with the bytes of bitsandbytes' `int8_vectorwise_quant` on the CPU.

    `weight` [out, in] -> "" int8 [out, in], "SCB" float32 [out] (the absolute maximum of each row). Raises InputError
    for NaN or infinity in the weight.
    """
    check_matrix(weight)
    rows, columns = weight.shape
    levels, peaks = torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows)
    work = RowBuffers(rows, columns)
    for start, stop in work.blocks:
        x = work.load(weight, start, stop)
        peak = peaks[start:stop]
        torch.amax(torch.abs(x, out=work.magnitudes[: x.numel()].view(x.shape)), -1, out=peak)
        x.mul_((127.0 / peak).masked_fill_(peak == 0, 0).unsqueeze(-1)).add_(ROUND)
        levels[start:stop].copy_(x.view(torch.int32))  # the low byte is the level in two's complement
    check_finite(peaks)
    return {"": levels, "SCB": peaks}


def unpack_int8_rowwise(packed: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decode the tensors of `pack_int8_rowwise`; in float32 equal to bitsandbytes' `int8_vectorwise_dequant`."""
    return decode_int8_rowwise(packed[""], scb=packed["SCB"], dtype=dtype)


def decode_int8_rowwise(levels: Tensor, *, scb: Tensor, dtype: torch.dtype) -> Tensor:
    """Decode `levels` int8 [..., out, in] and `scb` float32 [..., out] to `dtype` [..., out, in], on any device."""
    rows, scale = levels.reshape(-1, levels.shape[-1]), scb.reshape(-1, 1).float()
    result = torch.empty(rows.shape, dtype=dtype, device=levels.device)
    step = max(1, (BLOCK if levels.device.type == "cpu" else 1 << 24) // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        block = rows[start : start + step].float().mul_(scale[start : start + step]).mul_(_INT8_TO_UNIT)
        result[start : start + step].copy_(block)
    return result.view(levels.shape)
