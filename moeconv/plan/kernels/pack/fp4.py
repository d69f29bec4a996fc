"""4-bit floats (E2M1) of compressed-tensors, two codes per byte: NVFP4 (groups of 16 with FP8 scales, and one scale for
the whole weight) and MXFP4 (OCP Microscaling, 2023). The bytes are those of llm-compressor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moeconv.plan.kernels.pack.common import SCRATCH, check_finite, check_matrix, row_blocks
from moeconv.plan.kernels.pack.float_grids import E2M1_LEVELS, mxfp4_grid, nvfp4_grid
from moeconv.plan.kernels.pack.levels import E4M3_MAX, Coded
from moeconv.plan.kernels.pack.microscale import MX_GROUP, exponents_from, exponents_of, powers_below
from moeconv.plan.kernels.pack.peaks import peaks
from moeconv.plan.kernels.pack.roundings import e2m1_codes, join_nibbles
from moeconv.plan.kernels.pack.scales import fitted

NVFP4_GROUP = 16


def pack_nvfp4(weight: Tensor, *, beside: Sequence[Tensor] = (), fit: bool = False) -> dict[str, Tensor]:
    """NVFP4: `weight_packed` uint8 [out, in / 2], the low nibble first; `weight_scale` float8_e4m3fn [out, in / 16];
    and `weight_global_scale` float32 [1], by which the scales are divided. It is that of the largest magnitude in
    `weight` [out, in] and in the weights `beside` it, which an engine joins with it to one matrix. With `fit`, the
    scales of groups are those of least squared error.

    Raises UsageError for a weight that is not a float matrix, InputError for NaN or infinity in it.
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
    for start, stop in row_blocks(rows, columns):
        x = weight[start:stop].view(stop - start, -1, NVFP4_GROUP)
        quotients = SCRATCH("values", x.shape).copy_(x).div_(finest[start:stop, :, None])
        join_nibbles(e2m1_codes(quotients), packed[start:stop])
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
    zeros = "all" if signed_zeros else "numbers"
    for start, stop in row_blocks(rows, columns):
        x = weight[start:stop]
        each = exponents[start:stop]
        if not fit:
            each.copy_(exponents_of(peaks(x, group=MX_GROUP), below=2))
        x = x.view(stop - start, -1, MX_GROUP)
        quotients = SCRATCH("values", x.shape).copy_(x).mul_(powers_below(each)[..., None])
        join_nibbles(e2m1_codes(quotients, zeros=zeros), packed[start:stop])
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
    for start, stop in row_blocks(rows, columns):
        join_nibbles(e2m1_codes(levels[start:stop].contiguous()), packed[start:stop])
    return packed
