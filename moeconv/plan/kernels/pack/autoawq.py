"""Decodes AWQ's layout (AutoAWQ, version gemm): scale * (code - zero point), in the dtype of the scales.

The stored matrices are transposed: codes [in, out] and zero points [groups, out] of 4 bits, in 32-bit words along
`out`. From the lowest bits on, a word has the columns 0, 2, 4, 6, 1, 3, 5, 7 of its eight.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moeconv.plan.kernels.pack.common import row_blocks
from moeconv.plan.kernels.pack.integer import unpack_levels

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of column i in its word


def unpack_awq(parts: Mapping[str, Tensor], *, group_size: int | None) -> Tensor:
    """The weight [out, in] from "qweight" int32 [in, out / 8], "qzeros" int32 [groups, out / 8] and "scales"
    [groups, out]; `group_size` None is one group. Raises ValueError for shapes that contradict each other."""
    words, scales = parts["qweight"], parts["scales"]
    columns, (groups, rows) = words.shape[0], scales.shape
    size = group_size or columns
    if groups * size != columns or parts["qzeros"].shape[0] != groups:
        raise ValueError(
            f"qweight {list(words.shape)} and qzeros {list(parts['qzeros'].shape)} for scales {list(scales.shape)}"
        )
    zeros = _levels(parts["qzeros"], rows, scales.dtype)
    out = torch.empty(rows, columns, dtype=scales.dtype)
    for start, stop in row_blocks(columns, rows):
        of = torch.arange(start, stop) // size
        levels = _levels(words[start:stop], rows, scales.dtype).sub_(zeros[of]).mul_(scales[of])
        out[:, start:stop] = levels.T
    return out


def _levels(words: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """The codes less 8, [n, rows]."""
    levels = unpack_levels(words, bits=4, columns=rows)
    return levels.view(len(words), -1, 8)[:, :, _PLACES].reshape(len(words), rows).to(dtype)
