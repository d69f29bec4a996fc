"""4-bit floats (E2M1) of compressed-tensors, two codes per byte: NVFP4 (groups of 16 with FP8 scales, and one scale for
the whole weight) and MXFP4 (OCP Microscaling, 2023). The bytes are those of llm-compressor."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from moeconv.plan.kernels.pack.common import check_finite, check_matrix, row_blocks
from moeconv.plan.kernels.pack.float_grids import E2M1_LEVELS, mxfp4_grid, nvfp4_grid
from moeconv.plan.kernels.pack.levels import E4M3_MAX, Coded
from moeconv.plan.kernels.pack.microscale import MX_GROUP, exponents_from, exponents_of, powers_below
from moeconv.plan.kernels.pack.peaks import peaks
from moeconv.plan.kernels.pack.scales import fitted

NVFP4_GROUP = 16
_CUT = 20  # bits of a float32 below its three highest bits of mantissa; all midpoints between levels end there


def pack_nvfp4(weight: Tensor, *, beside: Sequence[Tensor] = (), fit: bool = False) -> dict[str, Tensor]:
    """NVFP4: `weight_packed` uint8 [out, in / 2], the low nibble first; `weight_scale` float8_e4m3fn [out, in / 16];
    and `weight_global_scale` float32 [1], by which the scales are divided. It is that of the largest magnitude in
    `weight` [out, in] and in the weights `beside` it, which an engine joins with it to one matrix. With `fit`, the
    scales of groups are those of least squared error.

    Raises UsageError for a weight that is no float matrix, InputError for NaN or infinity in it.
    """
    check_matrix(weight)
    rows, columns = weight.shape
    largest = peaks(weight, group=NVFP4_GROUP)
    check_finite(largest)
    whole = global_scale([largest, *(peaks(other, group=other.shape[-1]) for other in beside)])
    if fit:
        peak = E4M3_MAX * E2M1_LEVELS[-1] / whole
        finest = fitted(weight, nvfp4_grid(), group=NVFP4_GROUP, peak=peak)
    else:
        finest = (whole * (largest / E2M1_LEVELS[-1]).float()).clamp_(max=E4M3_MAX).to(torch.float8_e4m3fn).float()
        finest.masked_fill_(finest == 0, 0.125)
    scales = finest.to(torch.float8_e4m3fn)
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8)
    finest.div_(whole)
    work = _Buffers(rows, columns)
    for start, stop in work.blocks:
        x = weight[start:stop].view(stop - start, -1, NVFP4_GROUP)
        quotients = work.values_of(x).copy_(x).div_(finest[start:stop, :, None])
        work.to_nibbles(quotients, packed[start:stop])
    return {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": whole}


def global_scale(largest: Sequence[Tensor]) -> Tensor:
    """448 * 6 / max, which maps the largest magnitude of all `largest` to the largest scale and code; float32 [1]. It
    is computed in the dtype of the weights, or in float32 where it does not fit into that; 1 where they are zero."""
    peak = torch.stack([each.max() for each in largest]).max()
    if peak == 0:
        return torch.ones(1)
    most = E4M3_MAX * E2M1_LEVELS[-1]
    quotient = (most / peak).float()
    if not quotient.isfinite():
        quotient = (most / peak.float()).clamp(max=torch.finfo(torch.float32).max)
    return quotient.reshape(1)


def pack_mxfp4(weight: Tensor, *, signed_zeros: bool = False, fit: bool = False) -> dict[str, Tensor]:
    """MXFP4: `weight_packed` uint8 [out, in / 2], the low nibble first, and exponents `weight_scale` uint8 [out, in /
    32] (base 2, with a bias of 127). `signed_zeros`: -0 has a code of its own. With `fit`, the exponents are those of
    least squared error. Raises as `pack_nvfp4` does."""
    check_matrix(weight)
    rows, columns = weight.shape
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8)
    exponents = torch.empty(rows, columns // MX_GROUP, dtype=torch.uint8)
    if fit:
        exponents = exponents_from(fitted(weight, mxfp4_grid(), group=MX_GROUP))
    work = _Buffers(rows, columns, signed_zeros=signed_zeros)
    for start, stop in work.blocks:
        x = weight[start:stop]
        each = exponents[start:stop]
        if not fit:
            each.copy_(exponents_of(peaks(x, group=MX_GROUP), below=2))
        x = x.view(stop - start, -1, MX_GROUP)
        quotients = work.values_of(x).copy_(x).mul_(powers_below(each)[..., None])
        work.to_nibbles(quotients, packed[start:stop])
    return {"weight_packed": packed, "weight_scale": exponents}


def nvfp4_parts(coded: Coded) -> dict[str, Tensor]:
    """The tensors of `pack_nvfp4` for chosen codes."""
    assert coded.unit is not None
    return {
        "weight_packed": _packed(coded.levels),
        "weight_scale": coded.scales.to(torch.float8_e4m3fn),
        "weight_global_scale": coded.unit[0].reciprocal(),
    }


def mxfp4_parts(coded: Coded) -> dict[str, Tensor]:
    """The tensors of `pack_mxfp4` for chosen codes."""
    return {"weight_packed": _packed(coded.levels), "weight_scale": exponents_from(coded.scales)}


def _packed(levels: Tensor) -> Tensor:
    """The bytes [out, in / 2] of levels [out, in] of E2M1."""
    rows, columns = levels.shape
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8)
    work = _Buffers(rows, columns)
    for start, stop in work.blocks:
        work.to_nibbles(levels[start:stop].contiguous(), packed[start:stop])
    return packed


class _Buffers:
    """The temporary buffers of one call, for blocks of rows that stay in the cache."""

    def __init__(self, rows: int, columns: int, *, signed_zeros: bool = False) -> None:
        self.code_of_key = _code_of_key(signed_zeros)
        self.blocks = list(row_blocks(rows, columns))
        size = columns * max((stop - start for start, stop in self.blocks), default=0)
        self.values = torch.empty(size)
        self.keys, self.above = np.empty(size, np.uint32), np.empty(size, np.uint32)
        self.codes = torch.empty(size, dtype=torch.uint8)
        self.pairs = np.empty(size // 2, np.int16)

    def values_of(self, x: Tensor) -> Tensor:
        """A float32 buffer of the shape of `x`."""
        return self.values[: x.numel()].view(x.shape)

    def to_nibbles(self, x: Tensor, packed: Tensor) -> None:
        """The nearest codes to `x` float32, ties to the even code, in pairs to the bytes of `packed`."""
        count = x.numel()
        bits = x.view(-1).view(torch.int32).numpy().view(np.uint32)
        keys, above, codes = self.keys[:count], self.above[:count], self.codes[:count]
        # twice the upper bits, plus one where a lower bit is set: what lies between two midpoints has one key
        np.right_shift(bits, _CUT, out=keys)
        np.add(bits, (1 << _CUT) - 1, out=above)
        np.right_shift(above, _CUT, out=above)
        np.add(keys, above, out=keys)
        torch.index_select(self.code_of_key, 0, torch.from_numpy(keys.view(np.int32)), out=codes)
        twos = codes.view(torch.int16).numpy()  # first | second << 8
        pairs = np.right_shift(twos, 4, out=self.pairs[: count // 2])
        np.bitwise_or(pairs, twos, out=pairs)
        packed.view(-1).copy_(torch.from_numpy(pairs))  # keeps the low byte: first | second << 4


@lru_cache(maxsize=2)
def _code_of_key(signed_zeros: bool) -> Tensor:
    """The code, uint8 [8192], of every key of `_Buffers.to_nibbles`."""
    keys = np.arange(1 << (33 - _CUT), dtype=np.uint32)
    inside = keys & 1  # between two values whose lower bits are zero: take one of them
    values = np.abs(((keys >> 1 << _CUT) | inside).view(np.float32))
    middles = np.array([(low + high) / 2 for low, high in pairwise(E2M1_LEVELS)], np.float32)
    below = np.searchsorted(middles, values, side="left")  # midpoints below the value: a tie goes down
    tie = (below < len(middles)) & (values == middles[np.minimum(below, len(middles) - 1)])
    code = below + (tie & (below % 2 == 1))
    negative = ((keys >> 1 << _CUT) >> 31).astype(bool) & ((values > 0) | signed_zeros)
    return torch.from_numpy((code | (negative.astype(np.int64) << 3)).astype(np.uint8))
