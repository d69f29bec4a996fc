"""Decodes GPTQ's layout, as AutoGPTQ and GPTQModel define it: scale * (code - zero point), in the dtype of the scales.

The stored matrices are transposed: codes [in, out] in 32-bit words along `in`, zero points [groups, out] in words along
`out`. Codes follow each other without gaps, so that codes of 3 bits cross the ends of words.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moeconv.plan.kernels.pack.common import row_blocks
from moeconv.plan.kernels.pack.integer import unpack_levels


def unpack_gptq(parts: Mapping[str, Tensor], *, bits: int, group_size: int | None, offset: bool) -> Tensor:
    """The weight [out, in] from "qweight" int32 [in * bits / 32, out], "qzeros" int32 [groups, out * bits / 32],
    "scales" [groups, out], and optionally "g_idx" [in], the group of each column (None: `group_size` columns after each
    other, None for all).

    `offset`: zero points are stored less 1 (checkpoint_format gptq, not gptq_v2). Raises ValueError for shapes that
    contradict each other, a group that does not exist, and a zero point that the offset cannot express.
    """
    scales, words = parts["scales"], parts["qweight"]
    groups, rows = scales.shape
    columns = words.shape[0] * 32 // bits
    if words.shape[1] != rows or parts["qzeros"].shape[0] != groups:
        raise ValueError(
            f"qweight {list(words.shape)} and qzeros {list(parts['qzeros'].shape)} for scales {list(scales.shape)}"
        )
    # codes and zero points are both read minus 2^(bits - 1), which cancels in their difference
    zeros = unpack_levels(parts["qzeros"], bits=bits, columns=rows)
    if offset and bool((zeros == (1 << (bits - 1)) - 1).any()):
        raise ValueError(
            f"qzeros has the code {(1 << bits) - 1}, the zero point {1 << bits}, which runtimes read differently: "
            "checkpoint_format gptq cannot store the zero point 0"
        )
    least = (zeros.to(scales.dtype) + offset).T.contiguous()
    factors, of_column = scales.T.contiguous(), _groups(parts.get("g_idx"), columns, group_size or columns, groups)
    out = torch.empty(rows, columns, dtype=scales.dtype)
    in_order = columns % groups == 0 and torch.equal(of_column, torch.arange(columns) // (columns // groups))
    # columns in the order of their groups need no copy of the scales for each of them
    pick, width = (slice(None), columns // groups) if in_order else (of_column, 1)
    for start, stop in row_blocks(rows, columns):
        levels = unpack_levels(words[:, start:stop].T, bits=bits, columns=columns).to(scales.dtype)
        each = levels.view(stop - start, -1, width).sub_(least[start:stop, pick, None])
        torch.mul(each, factors[start:stop, pick, None], out=out[start:stop].view(each.shape))
    return out


def _groups(g_idx: Tensor | None, columns: int, size: int, groups: int) -> Tensor:
    """The group of each column. Raises ValueError for a group without scales."""
    found = torch.arange(columns) // size if g_idx is None else g_idx.long()
    if found.shape != (columns,):
        raise ValueError(f"g_idx {list(found.shape)} for {columns} columns")
    least, most = (int(end) for end in found.aminmax())
    if least < 0 or most >= groups:
        raise ValueError(f"g_idx names the groups {least} to {most}, but there are scales for {groups} groups")
    return found
