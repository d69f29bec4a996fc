"""The integer words of compressed-tensors' layout pack-quantized, equal bit by bit to those of the library."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from moeconv.errors import UsageError
from moeconv.plan.kernels.pack.bits import join_bits, split_bits
from moeconv.plan.kernels.pack.common import (
    ROUND,
    RowBuffers,
    check_finite,
    check_matrix,
    look_up,
    pairs_of,
    row_blocks,
)

WIDTHS = (2, 3, 4, 8)
_WORDS_HINT = "Choose bits and a group size that divide the matrix's input width, or leave this projection unquantized."


def pack_int(
    weight: Tensor,
    *,
    bits: int,
    group_size: int | None,
    scales: Tensor | None = None,
    fit: bool = False,
) -> dict[str, Tensor]:
    """Quantize and pack one matrix in the layout `pack-quantized` of compressed-tensors, symmetric.

    `weight` [out, in] is bfloat16, float16 or float32. `group_size` divides `in`; None means one scale per row
    (channel). `scales` [out, groups] replace the round-to-nearest scales (for example those of GPTQ); with `fit`, the
    scales are chosen for the least squared error instead (`fitted_scales`). Returns `weight_packed` int32 [out, in *
    bits / 32], `weight_scale` [out, groups] in the dtype of the weight, `weight_shape` int64 [2].

    Raises UsageError for sizes that do not divide, InputError for NaN or infinity in the weight.
    """
    group = _check_int(weight, bits=bits, group_size=group_size)
    rows, columns = weight.shape
    if scales is None and fit:
        scales = fitted_scales(weight, bits=bits, group_size=group_size)
    given = scales is not None
    if scales is None:
        scales = torch.empty(rows, columns // group, dtype=weight.dtype)
    scales = _usable_scales(scales, weight, group) if given else scales
    words = torch.empty(rows, columns * bits // 32, dtype=torch.int32)
    work = RowBuffers(rows, columns)
    for start, stop in work.blocks:
        x = work.load(weight, start, stop)  # float32 [r, in]
        if not given:
            _absmax_scales(x.view(-1, group), work, bits=bits, out=scales[start:stop].view(-1))
        _to_levels(x.view(-1, group), scales[start:stop].reshape(-1, 1), bits=bits, zero=1 << (bits - 1))
        _levels_to_words(x, words[start:stop], work, bits=bits)
    if not given:
        check_finite(scales)
    return {"weight_packed": words, "weight_scale": scales, "weight_shape": torch.tensor([rows, columns])}


def int_scales(weight: Tensor, *, bits: int, group_size: int | None) -> Tensor:
    """Round-to-nearest scales, amax over half the number of steps between the levels (7.5 with 4 bits): [out, groups]
    in the weight's dtype."""
    group = _check_int(weight, bits=bits, group_size=group_size)
    rows, columns = weight.shape
    scales = torch.empty(rows, columns // group, dtype=weight.dtype)
    work = RowBuffers(rows, columns)
    for start, stop in work.blocks:
        x = work.load(weight, start, stop)
        _absmax_scales(x.view(-1, group), work, bits=bits, out=scales[start:stop].view(-1))
    check_finite(scales)
    return scales


def fitted_scales(weight: Tensor, *, bits: int, group_size: int | None) -> Tensor:
    """Scales of (nearly) least squared error, [out, groups] in the dtype of the weight. They are never worse than
    `int_scales`.

    Levels run from -8 to 7, so the value of largest magnitude in a group should be on the negative side, which has one
    level more. If this value is positive, the scale is negative; readers multiply by it like by any other scale (Q4_0
    of ggml does the same). The scale is then fitted to the levels that it gives, twice. Smaller scales, which clip the
    value, are not tried: they lower the error of the weights by another 4 %, but raise the error of a layer's output
    where large weights are multiplied by large activations (by a quarter in the first layer of an upcycled model).
    """
    group = _check_int(weight, bits=bits, group_size=group_size)
    rows, columns = weight.shape
    result = torch.empty(rows, columns // group, dtype=weight.dtype)
    work = RowBuffers(rows, columns)
    for start, stop in work.blocks:
        x = work.load(weight, start, stop).view(-1, group)  # [groups here, group]
        plain = torch.empty(x.shape[0], dtype=weight.dtype)
        _absmax_scales(x, work, bits=bits, out=plain)
        levels = work.magnitudes[: x.numel()].view(x.shape)
        low, high = x.amin(-1), x.amax(-1)
        peak = torch.maximum(high, -low).masked_fill_(high == low, 1.0)
        x.div_(peak[:, None])  # so that squares neither overflow nor underflow
        best = torch.where(high > -low, -1.0, 1.0) / (1 << (bits - 1))
        most = torch.zeros_like(peak)
        for _ in range(2):
            along, energy = _fit(x, best, levels, bits=bits)
            fitted = torch.where(energy > 0, along / energy, best)
            saved = along * fitted  # sum x^2 minus the error with the fitted scale
            better = saved > most
            best, most = torch.where(better, fitted, best), torch.where(better, saved, most)
        stored = (best * peak).to(weight.dtype)
        errors = []
        for scales in (plain, stored):
            size = scales.float() / peak
            along, energy = _fit(x, size, levels, bits=bits)
            errors.append(size * (size * energy - 2 * along))
        result[start:stop].view(-1).copy_(torch.where((errors[1] < errors[0]) & (stored != 0), stored, plain))
    check_finite(result)
    return result


def _fit(x: Tensor, scales: Tensor, levels: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
    """(sum x q, sum q^2) per group, where q are the levels of x [groups, group] with `scales` [groups]. `levels` is
    scratch memory."""
    half = 1 << (bits - 1)
    torch.mul(x, scales.reciprocal()[:, None], out=levels)
    levels.add_(ROUND).clamp_(ROUND - half, ROUND + half - 1).sub_(ROUND)
    q = levels.numpy()  # numpy multiplies and sums in one pass
    return torch.from_numpy(np.einsum("gi,gi->g", x.numpy(), q)), torch.from_numpy(np.einsum("gi,gi->g", q, q))


def quantize_int(weight: Tensor, *, scales: Tensor, bits: int) -> Tensor:
    """Levels clamp(round(w / scale)) as int8 [out, in], from -2^(bits - 1) to 2^(bits - 1) - 1.

    `scales` is [out, groups], where groups divides `in`. The quotient is computed in float32, and halves are rounded to
    the even level.
    """
    rows, columns = weight.shape
    group = _check_int(weight, bits=bits, group_size=columns // max(1, scales.shape[-1]))
    scales = _usable_scales(scales, weight, group)
    levels = torch.empty(rows, columns, dtype=torch.int8)
    work = RowBuffers(rows, columns)
    for start, stop in work.blocks:
        x = work.load(weight, start, stop)
        _to_levels(x.view(-1, group), scales[start:stop].reshape(-1, 1), bits=bits, zero=0)
        levels[start:stop].copy_(x.view(torch.int32))  # the low byte is the level in two's complement
    return levels


def pack_words(levels: Tensor, *, bits: int) -> Tensor:
    """int8 levels [out, in] -> int32 words [out, in * bits / 32]: level + 2^(bits - 1), the least significant bits
    first."""
    rows, columns = levels.shape
    if columns * bits % 32:
        raise UsageError(f"{columns} columns of {bits} bits do not fill whole 32-bit words", hint=_WORDS_HINT)
    if bits == 8:
        return (levels.contiguous().view(torch.uint8) ^ 0x80).view(torch.int32)
    words = torch.empty(rows, columns * bits // 32, dtype=torch.int32)
    work = RowBuffers(rows, columns)
    for start, stop in work.blocks:
        each = work.bytes_[: (stop - start) * columns]
        torch.add(levels[start:stop].reshape(-1), 1 << (bits - 1), out=each.view(torch.int8))
        _join(each, words[start:stop], work, bits=bits)
    return words


def unpack_words(words: Tensor, *, bits: int, columns: int) -> Tensor:
    """int32 words [out, in * bits / 32] -> int8 levels [out, in]."""
    rows = words.shape[0]
    octets = words.contiguous().view(torch.uint8)  # [out, 4 * words]
    if bits == 8:
        return (octets ^ 0x80).view(torch.int8)[:, :columns]
    if bits != 4:
        spare = -octets.shape[1] % bits  # padding of a row whose codes do not divide into groups of eight
        octets = torch.nn.functional.pad(octets, (0, spare)) if spare else octets
        split = split_bits(octets.contiguous(), bits=bits).view(torch.int8)
        return split.sub_(1 << (bits - 1)).view(rows, -1)[:, :columns]
    levels = torch.empty(rows, octets.shape[1], 2, dtype=torch.int8)
    levels[..., 0].copy_((octets & 0x0F).view(torch.int8)).sub_(8)
    levels[..., 1].copy_((octets >> 4).view(torch.int8)).sub_(8)
    return levels.view(rows, -1)[:, :columns]


def unpack_levels(words: Tensor, *, bits: int, columns: int) -> Tensor:
    """`unpack_words` for words in any memory layout. Raises ValueError for words that do not have `columns` levels per
    row."""
    if words.ndim != 2 or words.shape[1] != -(-columns * bits // 32):
        raise ValueError(f"words of shape {list(words.shape)} do not hold {columns} columns of {bits} bits")
    return unpack_words(words, bits=bits, columns=columns)


def unpack_int(
    packed: Mapping[str, Tensor], *, bits: int, dtype: torch.dtype | None = None, zero_points: Tensor | None = None
) -> Tensor:
    """Decode the tensors of `pack_int` to [out, in]: level * scale in float32, rounded once to `dtype` (None: the dtype
    of the scale, which compressed-tensors returns). `zero_points` int8 [out, groups] are subtracted from the levels
    first.

    Raises ValueError for words, scales or zero points that do not have the stated shape.
    """
    rows, columns = (int(size) for size in packed["weight_shape"])
    words, scales = packed["weight_packed"], packed["weight_scale"]
    groups = scales.shape[1]
    if words.shape[0] != rows or scales.shape[0] != rows or not groups or columns % groups:
        raise ValueError(f"scales of shape {list(scales.shape)} and words of shape {list(words.shape)}")
    if zero_points is not None and zero_points.shape != scales.shape:
        raise ValueError(f"zero points of shape {list(zero_points.shape)} for scales of shape {list(scales.shape)}")
    result = torch.empty(rows, columns, dtype=dtype or scales.dtype)
    for start, stop in row_blocks(rows, columns):
        levels = _float_levels(words[start:stop], bits=bits, columns=columns)
        each = levels.view(-1, columns // groups)
        if zero_points is not None:
            each.sub_(zero_points[start:stop].reshape(-1, 1).float())
        each.mul_(scales[start:stop].reshape(-1, 1).float())
        result[start:stop].copy_(levels)
    return result


def _float_levels(words: Tensor, *, bits: int, columns: int) -> Tensor:
    """`unpack_levels` in float32: two 4-bit levels at a time are looked up as one word."""
    if bits != 4 or columns % 8 or words.ndim != 2 or words.shape[1] != columns // 8:
        return unpack_levels(words, bits=bits, columns=columns).float()
    levels = torch.empty(words.shape[0], columns)
    look_up(words.contiguous().view(torch.uint8).view(-1), _nibble_pairs(), levels)
    return levels


@lru_cache(maxsize=1)
def _nibble_pairs() -> Tensor:
    return pairs_of(torch.arange(-8.0, 8.0))


def _absmax_scales(x: Tensor, work: RowBuffers, *, bits: int, out: Tensor) -> None:
    """`x` float32 [groups, group] -> `out` [groups]; a zero scale becomes eps, as in compressed-tensors."""
    magnitudes = torch.abs(x, out=work.magnitudes[: x.numel()].view(x.shape))
    out.copy_(magnitudes.amax(-1).div_(((1 << bits) - 1) / 2))
    out.masked_fill_(out == 0, torch.finfo(out.dtype).eps)


def _to_levels(x: Tensor, scales: Tensor, *, bits: int, zero: int) -> None:
    """In place: `x` float32 [groups, group] becomes ROUND + zero + clamp(round(x / scales)); `scales` [groups, 1]."""
    half = 1 << (bits - 1)
    x.div_(scales.float()).add_(ROUND + zero).clamp_(ROUND + zero - half, ROUND + zero + half - 1)


def _levels_to_words(x: Tensor, words: Tensor, work: RowBuffers, *, bits: int) -> None:
    """Pack `x`, as `_to_levels` returns it with zero = half, so that its low byte is the unsigned level; `words` [r,
    ...]."""
    if bits == 8:
        words.view(torch.uint8).copy_(x.view(torch.int32))
        return
    each = work.bytes_[: x.numel()]
    each.copy_(x.view(torch.int32).view(-1))
    _join(each, words, work, bits=bits)


def _join(codes: Tensor, words: Tensor, work: RowBuffers, *, bits: int) -> None:
    """Pack uint8 values below 2^bits into `words` (contiguous int32)."""
    if bits == 4:
        _join_nibbles(codes, words, work)
    else:
        join_bits(codes, bits=bits, out=words)


def _join_nibbles(nibbles: Tensor, words: Tensor, work: RowBuffers) -> None:
    """Join uint8 values below 16 in pairs, with the first in the low nibble, into `words` (contiguous int32)."""
    twos = nibbles.view(torch.int16)  # first | second << 8
    pairs = work.pairs[: twos.numel()]
    np.right_shift(twos.numpy(), 4, out=pairs.numpy())  # numpy shifts 16-bit integers six times faster than torch
    words.view(torch.uint8).view(-1).copy_(pairs.bitwise_or_(twos))  # keeps the low byte: first | second << 4


def _check_int(weight: Tensor, *, bits: int, group_size: int | None) -> int:
    """The group size in columns. Raises UsageError for sizes that would give a layout which readers decode wrongly."""
    if bits not in WIDTHS:
        widths = ", ".join(map(str, WIDTHS))
        raise UsageError(f"pack-quantized weights have {widths} bits, not {bits}", hint="Pass another number of bits.")
    check_matrix(weight)
    columns = weight.shape[1]
    group = columns if group_size is None else group_size
    if group < 1 or columns % group:
        raise UsageError(f"a group size of {group} does not divide the input width {columns}", hint=_WORDS_HINT)
    if columns * bits % 32:
        raise UsageError(f"{columns} columns of {bits} bits do not fill whole 32-bit words", hint=_WORDS_HINT)
    return group


def _usable_scales(scales: Tensor, weight: Tensor, group: int) -> Tensor:
    rows, columns = weight.shape
    if tuple(scales.shape) != (rows, columns // group):
        raise UsageError(
            f"scales of shape {tuple(scales.shape)} do not fit a weight of shape {(rows, columns)}, groups of {group}",
            hint=f"Pass scales of shape {(rows, columns // group)}.",
        )
    check_finite(scales)
    return scales.masked_fill(scales == 0, torch.finfo(scales.dtype).eps)
