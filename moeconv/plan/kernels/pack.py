"""Pack and unpack quantized weights: INT4/INT8 words (compressed-tensors), NF4/FP4 and row-wise INT8 (bitsandbytes).

Pure tensor functions, streamed in blocks that stay in cache; every format is bit-equal to its own library's.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from moeconv.errors import InputError, UsageError

# Elements a pass works on: float32 buffers of 1 MB, which stay in cache and beside which the fixed cost of some thirty
# torch calls (50 us a block) is small. Measured at 4096 x 4096: 1 << 16 is 1.7 times slower, 1 << 20 slower for NF4.
BLOCK = 1 << 18

# Adding 1.5 * 2^23 to a float32 of small magnitude rounds it to an integer, half to even like torch.round, and leaves
# that integer in the low mantissa bits: rounding and conversion in one pass over memory.
_ROUND = 12582912.0

_INT8_TO_UNIT = 7.874015718698502e-3  # 1 / 127 as bitsandbytes spells it (int8_vectorwise_dequant)
_BNB_TINY = 1e-38  # bitsandbytes' floor for absmax
_BNB_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)

# QLoRA, arXiv 2305.14314, appendix E; and bitsandbytes' FP4 (sign, two exponent bits, one mantissa bit) in code order.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, 0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0)


# ---------------------------------------------------------------------------------------------- compressed-tensors


def pack_int(
    weight: Tensor,
    *,
    bits: int,
    group_size: int | None,
    scales: Tensor | None = None,
    clip: bool = False,
) -> dict[str, Tensor]:
    """Quantize and pack one matrix as compressed-tensors `pack-quantized`, symmetric.

    `weight` [out, in] bfloat16, float16 or float32; `group_size` divides `in`, None is one scale a row (channel).
    `scales` [out, groups] overrides the round-to-nearest scales (GPTQ and friends); `clip` searches them for the least
    squared error instead (`clip_scales`). Returns `weight_packed` int32 [out, in * bits / 32], `weight_scale` of the
    weight's dtype [out, groups], `weight_shape` int64 [2].

    Raises UsageError for sizes that do not divide, InputError for NaN or infinity in the weight.
    """
    group = _check_int(weight, bits=bits, group_size=group_size)
    rows, columns = weight.shape
    if scales is None and clip:
        scales = clip_scales(weight, bits=bits, group_size=group_size)
    given = scales is not None
    if scales is None:
        scales = torch.empty(rows, columns // group, dtype=weight.dtype)
    scales = _usable_scales(scales, weight, group) if given else scales
    words = torch.empty(rows, columns * bits // 32, dtype=torch.int32)
    work = _IntBuffers(rows, columns)
    for start, stop in work.blocks:
        x = work.load(weight, start, stop)  # float32 [r, in]
        if not given:
            _absmax_scales(x.view(-1, group), work, bits=bits, out=scales[start:stop].view(-1))
        _to_levels(x.view(-1, group), scales[start:stop].reshape(-1, 1), bits=bits, zero=1 << (bits - 1))
        _levels_to_words(x, words[start:stop], work, bits=bits)
    if not given:
        _check_finite(scales)
    return {"weight_packed": words, "weight_scale": scales, "weight_shape": torch.tensor([rows, columns])}


def int_scales(weight: Tensor, *, bits: int, group_size: int | None) -> Tensor:
    """Round-to-nearest scales amax / 7.5 (bits 4) or amax / 127.5 (bits 8): [out, groups] in the weight's dtype."""
    group = _check_int(weight, bits=bits, group_size=group_size)
    rows, columns = weight.shape
    scales = torch.empty(rows, columns // group, dtype=weight.dtype)
    work = _IntBuffers(rows, columns)
    for start, stop in work.blocks:
        x = work.load(weight, start, stop)
        _absmax_scales(x.view(-1, group), work, bits=bits, out=scales[start:stop].view(-1))
    _check_finite(scales)
    return scales


def clip_scales(weight: Tensor, *, bits: int, group_size: int | None, steps: int = 20) -> Tensor:
    """Scales of least squared error, [out, groups] in the weight's dtype.

    Tries r * amax / 7.5 (127.5) for `steps` ratios r in (0.5, 1], then the least-squares fit of the scale to the levels
    of the best ratio, kept where it helps."""
    group = _check_int(weight, bits=bits, group_size=group_size)
    rows, columns = weight.shape
    result = torch.empty(rows, columns // group, dtype=weight.dtype)
    work = _IntBuffers(rows, columns)
    for start, stop in work.blocks:
        x = work.load(weight, start, stop).view(-1, group)  # [groups here, group]
        top = torch.empty(x.shape[0], dtype=weight.dtype)
        _absmax_scales(x, work, bits=bits, out=top)
        best, least, levels = top, torch.full(top.shape, math.inf), torch.empty_like(x)
        fitted = top
        for step in range(steps, -1, -1):
            # The last round tries the fit of the scale to the levels that the winning ratio chose.
            trial = (top.float() * (0.5 + 0.5 * step / steps)).to(top.dtype) if step else fitted
            trial = trial.masked_fill(trial == 0, torch.finfo(trial.dtype).eps)
            levels.copy_(x)
            _to_levels(levels, trial.view(-1, 1), bits=bits, zero=0)
            levels.sub_(_ROUND)
            correlation, energy = (levels * x).sum(-1), levels.square().sum(-1)
            size = trial.float()
            # sum (x - s q)^2 less the constant sum x^2
            error = size * size * energy - 2 * size * correlation
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better, trial, best)
            if step:
                fit = (correlation / energy).to(top.dtype)
                fitted = torch.where(better & (energy > 0) & (fit > 0), fit, torch.where(better, trial, fitted))
        result[start:stop].view(-1).copy_(best)
    _check_finite(result)
    return result


def quantize_int(weight: Tensor, *, scales: Tensor, bits: int) -> Tensor:
    """Levels clamp(round(w / scale)) in [-8, 7] (bits 4) or [-128, 127] (bits 8) as int8 [out, in].

    `scales` [out, groups], groups divides `in`; the quotient is taken in float32 and halves go to the even level.
    """
    rows, columns = weight.shape
    group = _check_int(weight, bits=bits, group_size=columns // max(1, scales.shape[-1]))
    scales = _usable_scales(scales, weight, group)
    levels = torch.empty(rows, columns, dtype=torch.int8)
    work = _IntBuffers(rows, columns)
    for start, stop in work.blocks:
        x = work.load(weight, start, stop)
        _to_levels(x.view(-1, group), scales[start:stop].reshape(-1, 1), bits=bits, zero=0)
        levels[start:stop].copy_(x.view(torch.int32))  # the low byte is the level in two's complement
    return levels


def pack_words(levels: Tensor, *, bits: int) -> Tensor:
    """int8 levels [out, in] -> int32 words [out, in * bits / 32], level + 8 (+ 128), least significant nibble first."""
    rows, columns = levels.shape
    if columns * bits % 32:
        raise UsageError(f"{columns} columns of {bits} bits do not fill whole 32-bit words", hint=_WORDS_HINT)
    if bits == 8:
        return (levels.contiguous().view(torch.uint8) ^ 0x80).view(torch.int32)
    words = torch.empty(rows, columns // 8, dtype=torch.int32)
    work = _IntBuffers(rows, columns)
    for start, stop in work.blocks:
        nibbles = work.bytes_[: (stop - start) * columns]
        torch.add(levels[start:stop].reshape(-1), 8, out=nibbles.view(torch.int8))
        _join_nibbles(nibbles, words[start:stop], work)
    return words


def unpack_words(words: Tensor, *, bits: int, columns: int) -> Tensor:
    """int32 words [out, in * bits / 32] -> int8 levels [out, in]."""
    rows = words.shape[0]
    octets = words.contiguous().view(torch.uint8)  # [out, 4 * words]
    if bits == 8:
        return (octets ^ 0x80).view(torch.int8)[:, :columns]
    levels = torch.empty(rows, octets.shape[1], 2, dtype=torch.int8)
    levels[..., 0].copy_((octets & 0x0F).view(torch.int8)).sub_(8)
    levels[..., 1].copy_((octets >> 4).view(torch.int8)).sub_(8)
    return levels.view(rows, -1)[:, :columns]


def unpack_int(packed: Mapping[str, Tensor], *, bits: int, dtype: torch.dtype | None = None) -> Tensor:
    """Decode `pack_int`'s tensors to [out, in]: level * scale in float32, rounded once to `dtype` (the scale's if None,
    which is what compressed-tensors itself returns)."""
    rows, columns = (int(size) for size in packed["weight_shape"])
    words, scales = packed["weight_packed"], packed["weight_scale"]
    result = torch.empty(rows, columns, dtype=dtype or scales.dtype)
    group = columns // scales.shape[1]
    for start, stop in _row_blocks(rows, columns):
        levels = unpack_words(words[start:stop], bits=bits, columns=columns).float()
        levels.view(-1, group).mul_(scales[start:stop].reshape(-1, 1).float())
        result[start:stop].copy_(levels)
    return result


_WORDS_HINT = "Choose bits and a group size that divide the matrix's input width, or leave this projection unquantized."


class _IntBuffers:
    """The scratch memory of one call, allocated once: a block of rows in float32, its magnitudes, bytes, byte pairs."""

    def __init__(self, rows: int, columns: int) -> None:
        self.blocks = list(_row_blocks(rows, columns))
        size = columns * max((stop - start for start, stop in self.blocks), default=0)
        self.columns = columns
        self.values = torch.empty(size)
        self.magnitudes = torch.empty(size)
        self.bytes_ = torch.empty(size, dtype=torch.uint8)
        self.pairs = torch.empty(size // 2, dtype=torch.int16)

    def load(self, weight: Tensor, start: int, stop: int) -> Tensor:
        return self.values[: (stop - start) * self.columns].view(-1, self.columns).copy_(weight[start:stop])


def _row_blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK // max(1, columns))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _absmax_scales(x: Tensor, work: _IntBuffers, *, bits: int, out: Tensor) -> None:
    """`x` float32 [groups, group] -> `out` [groups]; a zero scale becomes eps, as in compressed-tensors."""
    magnitudes = torch.abs(x, out=work.magnitudes[: x.numel()].view(x.shape))
    out.copy_(magnitudes.amax(-1).div_(7.5 if bits == 4 else 127.5))
    out.masked_fill_(out == 0, torch.finfo(out.dtype).eps)


def _to_levels(x: Tensor, scales: Tensor, *, bits: int, zero: int) -> None:
    """In place: `x` float32 [groups, group] becomes _ROUND + zero + clamp(round(x / scales)); `scales` [groups, 1]."""
    half = 1 << (bits - 1)
    x.div_(scales.float()).add_(_ROUND + zero).clamp_(_ROUND + zero - half, _ROUND + zero + half - 1)


def _levels_to_words(x: Tensor, words: Tensor, work: _IntBuffers, *, bits: int) -> None:
    """`x` as left by `_to_levels` with zero = half, so that its low byte is the unsigned level; `words` [r, ...]."""
    if bits == 8:
        words.view(torch.uint8).copy_(x.view(torch.int32))
        return
    nibbles = work.bytes_[: x.numel()]
    nibbles.copy_(x.view(torch.int32).view(-1))
    _join_nibbles(nibbles, words, work)


def _join_nibbles(nibbles: Tensor, words: Tensor, work: _IntBuffers) -> None:
    """uint8 values below 16, two to a byte, the first in the low nibble, into `words` (contiguous int32)."""
    twos = nibbles.view(torch.int16)  # first | second << 8
    pairs = work.pairs[: twos.numel()]
    np.right_shift(twos.numpy(), 4, out=pairs.numpy())  # numpy shifts 16-bit integers six times faster than torch
    words.view(torch.uint8).view(-1).copy_(pairs.bitwise_or_(twos))  # keeps the low byte: first | second << 4


def _check_int(weight: Tensor, *, bits: int, group_size: int | None) -> int:
    """The group size in columns, after the checks that would otherwise give a silently wrong layout."""
    if bits not in (4, 8):
        raise UsageError(f"pack-quantized weights have 4 or 8 bits, not {bits}", hint="Pass bits=4 or bits=8.")
    _check_matrix(weight)
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
    _check_finite(scales)
    return scales.masked_fill(scales == 0, torch.finfo(scales.dtype).eps)


# ---------------------------------------------------------------------------------------------------- bitsandbytes


def pack_nf4(weight: Tensor, *, block_size: int = 64, quant_type: str = "nf4") -> dict[str, Tensor]:
    """Quantize to bitsandbytes' NF4 or FP4, bit-equal to its `quantize_4bit` on the CPU, without importing it.

    `weight` of any shape, bfloat16, float16 or float32. Returns, by the suffix that follows `weight` in a checkpoint:
    "" uint8 [ceil(n / 2), 1], first value in the high nibble; "absmax" float32 [ceil(n / block_size)]; "quant_map"
    float32 [16]; "quant_state.bitsandbytes__nf4" (or __fp4) uint8, JSON.

    Raises UsageError for a bad block size, type or dtype, InputError for NaN or infinity in the weight.
    """
    _check_4bit(weight, block_size=block_size, quant_type=quant_type)
    table = _table_4bit(quant_type)
    flat = weight.detach().reshape(-1)
    count = flat.numel()
    whole = count - count % block_size
    packed = torch.empty((count + 1) // 2, 1, dtype=torch.uint8)
    absmax = torch.empty(-(-count // block_size))
    step = BLOCK // block_size * block_size
    size = min(step, whole)
    x, y, at = torch.empty(size), torch.empty(size), torch.empty(size, dtype=torch.int32)
    codes, pairs = torch.empty(size, dtype=torch.uint8), torch.empty(size // 2, dtype=torch.int16)
    for start in range(0, whole, step):
        stop = min(start + step, whole)
        if stop - start < size:
            size = stop - start
            x, y, at, codes, pairs = x[:size], y[:size], at[:size], codes[:size], pairs[: size // 2]
        values = x.copy_(flat[start:stop]).view(-1, block_size)
        peak = absmax[start // block_size : stop // block_size]
        torch.amax(torch.abs(values, out=y.view(values.shape)), -1, out=peak)
        _encode_4bit(values, peak, y, at, codes, table)
        _join_high_first(codes, pairs, packed[start // 2 : stop // 2, 0])
    if count > whole:
        # bitsandbytes divides the last, short block where it multiplies the others, and floors its absmax.
        values = flat[whole:].float()
        peak = values.abs().max().clamp(min=_BNB_TINY)
        absmax[-1] = peak
        codes = _codes_by_search(torch.clamp(values / peak, -1, 1), table)
        if codes.numel() % 2:
            codes = torch.cat([codes, _codes_by_search(torch.zeros(1), table)])
        packed[whole // 2 :, 0] = (codes[::2] << 4) | codes[1::2]
    _check_finite(absmax)
    state = {
        "quant_type": quant_type,
        "blocksize": block_size,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    return {
        "": packed,
        "absmax": absmax,
        "quant_map": table.values.clone(),
        f"quant_state.bitsandbytes__{quant_type}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def unpack_nf4(packed: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> Tensor:
    """Decode `pack_nf4`'s tensors to the original shape, equal to bitsandbytes' `dequantize_4bit`.

    `dtype` None is the dtype that was packed. Raises InputError for a missing or nested (double quantized) state."""
    keys = [key for key in packed if key.startswith("quant_state.bitsandbytes__")]
    if len(keys) != 1 or any(key not in packed for key in ("", "absmax", "quant_map")):
        raise InputError(
            f"a 4-bit weight needs absmax, quant_map and one quant_state, found {sorted(packed)}",
            hint="The checkpoint is incomplete; quantize it again.",
        )
    state = read_quant_state(packed[keys[0]])
    shape = state["shape"]
    count = math.prod(shape)
    if packed[""].numel() != (count + 1) // 2 or packed["absmax"].numel() != -(-count // state["blocksize"]):
        raise InputError(
            f"a 4-bit weight of shape {shape} has {packed[''].numel()} bytes and {packed['absmax'].numel()} scales",
            hint="The checkpoint is damaged; quantize it again.",
        )
    values = decode_4bit(
        packed[""].reshape(-1),
        absmax=packed["absmax"],
        quant_map=packed["quant_map"],
        count=count,
        block_size=state["blocksize"],
        dtype=dtype or getattr(torch, state["dtype"]),
    )
    return values.view(shape)


def read_quant_state(state: Tensor) -> dict:
    """The JSON of `quant_state.bitsandbytes__*`: quant_type, blocksize, dtype, shape. InputError if it is not that."""
    try:
        fields = json.loads(bytes(state.cpu().numpy()))
        known = {"quant_type": str, "blocksize": int, "dtype": str, "shape": list}
        if not all(isinstance(fields[key], kind) for key, kind in known.items()):
            raise ValueError("a field of the wrong type")
        if fields["dtype"] not in ("bfloat16", "float16", "float32") or fields["blocksize"] not in _BNB_BLOCK_SIZES:
            raise ValueError("an unknown dtype or blocksize")
        if not all(type(size) is int and size > 0 for size in fields["shape"]):
            raise ValueError("a shape that is not of positive integers")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"a 4-bit weight's quant_state is not bitsandbytes' JSON: {error}", hint="Quantize the checkpoint again."
        ) from None
    if any(key.startswith("nested") for key in fields):
        raise InputError(
            "a 4-bit weight is double quantized (nested_* in its quant_state), which is not supported",
            hint="Quantize without double quantization (bnb_4bit_use_double_quant: false).",
        )
    return fields


def decode_4bit(
    packed: Tensor, *, absmax: Tensor, quant_map: Tensor, count: int, block_size: int, dtype: torch.dtype
) -> Tensor:
    """`packed` uint8 [ceil(count / 2)], `absmax` float32 [ceil(count / block_size)] -> `dtype` [count], on any device.

    A byte is looked up as a pair of float32 values, so a value costs half a gather."""
    octets = torch.arange(256, device=quant_map.device)
    pairs = torch.stack([quant_map[octets >> 4], quant_map[octets & 15]], -1).float().view(torch.int64).view(256)
    result = torch.empty(count + count % 2, dtype=dtype, device=packed.device)
    # On the CPU a step stays in cache; elsewhere it bounds the float32 temporary to 64 MB.
    step = BLOCK // block_size * block_size if packed.device.type == "cpu" else 1 << 24
    for start in range(0, result.numel(), step):
        stop = min(start + step, result.numel())
        values = pairs.index_select(0, packed[start // 2 : stop // 2].int()).view(torch.float32)
        scales = absmax[start // block_size : -(-stop // block_size)].float()
        whole = values.numel() // block_size * block_size
        values[:whole].view(-1, block_size).mul_(scales[: whole // block_size, None])
        if whole < values.numel():
            values[whole:].mul_(scales[-1])
        result[start:stop].copy_(values)
    return result[:count]


def pack_int8_rowwise(weight: Tensor) -> dict[str, Tensor]:
    """LLM.int8 row-wise (arXiv 2208.07339), bit-equal to bitsandbytes' `int8_vectorwise_quant` on the CPU.

    `weight` [out, in] -> "" int8 [out, in], "SCB" float32 [out] (each row's absolute maximum).
    Raises InputError for NaN or infinity in the weight."""
    _check_matrix(weight)
    rows, columns = weight.shape
    levels, peaks = torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows)
    work = _IntBuffers(rows, columns)
    for start, stop in work.blocks:
        x = work.load(weight, start, stop)
        peak = peaks[start:stop]
        torch.amax(torch.abs(x, out=work.magnitudes[: x.numel()].view(x.shape)), -1, out=peak)
        x.mul_((127.0 / peak).masked_fill_(peak == 0, 0).unsqueeze(-1)).add_(_ROUND)
        levels[start:stop].copy_(x.view(torch.int32))  # the low byte is the level in two's complement
    _check_finite(peaks)
    return {"": levels, "SCB": peaks}


def unpack_int8_rowwise(packed: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decode `pack_int8_rowwise`'s tensors; in float32 equal to bitsandbytes' `int8_vectorwise_dequant`."""
    return decode_int8_rowwise(packed[""], scb=packed["SCB"], dtype=dtype)


def decode_int8_rowwise(levels: Tensor, *, scb: Tensor, dtype: torch.dtype) -> Tensor:
    """`levels` int8 [..., out, in], `scb` float32 [..., out] -> `dtype` [..., out, in], on any device."""
    rows, scale = levels.reshape(-1, levels.shape[-1]), scb.reshape(-1, 1).float()
    result = torch.empty(rows.shape, dtype=dtype, device=levels.device)
    step = max(1, (BLOCK if levels.device.type == "cpu" else 1 << 24) // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        block = rows[start : start + step].float().mul_(scale[start : start + step]).mul_(_INT8_TO_UNIT)
        result[start : start + step].copy_(block)
    return result.view(levels.shape)


class _Table4Bit:
    """One 4-bit type: its 16 values, the midpoints between them in order, and a lookup table over [-1, 1].

    A value v in [-1, 1] falls into bin trunc(v * 2^14 + 2^14). `lookup` holds the bin's code, or FLAG where a midpoint
    lies inside the bin: about one value in two thousand, which is then searched for exactly."""

    FLAG = 0x10
    SCALE = 16384.0

    def __init__(self, quant_type: str) -> None:
        values = torch.tensor(_NF4 if quant_type == "nf4" else _FP4)
        self.values = values.div_(values.abs().max())
        order = torch.argsort(self.values)
        self.midpoints = (self.values[order[:-1]] + self.values[order[1:]]) / 2
        self.order = order.to(torch.uint8)
        above = torch.nextafter(self.midpoints, torch.tensor(math.inf))
        bins, bins_above = self.bin_of(self.midpoints), self.bin_of(above)
        self.lookup = self.order[torch.searchsorted(bins, torch.arange(2 * int(self.SCALE) + 1))]
        self.lookup[bins[bins == bins_above]] = self.FLAG

    def bin_of(self, values: Tensor) -> Tensor:
        return (values * self.SCALE + self.SCALE).long()


@functools.cache
def _table_4bit(quant_type: str) -> _Table4Bit:
    return _Table4Bit(quant_type)


def _encode_4bit(x: Tensor, peak: Tensor, y: Tensor, at: Tensor, codes: Tensor, table: _Table4Bit) -> None:
    """`x` float32 [blocks, block_size] with absolute maxima `peak` -> `codes` uint8 [n]; `y`, `at` are scratch [n]."""
    _check_finite(peak)
    inverse = peak.reciprocal()
    if not peak.min() > 1e-30:
        # A zero block (all values stay 0) or one so small that its inverse times SCALE could overflow.
        inverse = peak.clamp(min=_BNB_TINY).reciprocal_()
        if bool(((peak > 0) & (peak <= 1e-30)).any()):
            codes.copy_(_codes_by_search(torch.clamp(x * inverse[:, None], -1, 1).view(-1), table))
            return
        inverse.masked_fill_(peak == 0, 0)
    # SCALE is a power of two: this is exactly SCALE * (x * inverse), and x * inverse is what bitsandbytes compares.
    torch.mul(x, (inverse * table.SCALE)[:, None], out=y.view(x.shape))
    at.copy_(y.add_(table.SCALE))
    torch.index_select(table.lookup, 0, at, out=codes)
    mask = at.numpy().view(np.bool_)[: codes.numel()]  # `at` has served; numpy finds flags ten times faster than torch
    unsure = np.flatnonzero(np.greater_equal(codes.numpy(), table.FLAG, out=mask))
    if unsure.size:
        place = torch.from_numpy(unsure)
        exact = x.view(-1)[place] * inverse[place // x.shape[1]]
        codes[place] = _codes_by_search(exact, table)


def _codes_by_search(values: Tensor, table: _Table4Bit) -> Tensor:
    """The exact rule: the number of midpoints strictly below a value, in order of the code's values."""
    return table.order[torch.bucketize(values, table.midpoints)]


def _join_high_first(codes: Tensor, pairs: Tensor, octets: Tensor) -> None:
    """uint8 codes below 16, two to a byte, the first in the high nibble, into `octets` uint8 [n / 2]."""
    twos = codes.view(torch.int16)  # first | second << 8
    np.right_shift(twos.numpy(), 8, out=pairs.numpy())
    octets.copy_(pairs.add_(twos, alpha=16))  # keeps the low byte: first << 4 | second


def _check_4bit(weight: Tensor, *, block_size: int, quant_type: str) -> None:
    if quant_type not in ("nf4", "fp4"):
        raise UsageError(f"4-bit types are nf4 and fp4, not {quant_type!r}", hint="Pass quant_type='nf4' or 'fp4'.")
    if block_size not in _BNB_BLOCK_SIZES:
        raise UsageError(
            f"bitsandbytes has no block size {block_size}",
            hint=f"Choose one of {', '.join(map(str, _BNB_BLOCK_SIZES))}.",
        )
    _check_float(weight)


# ----------------------------------------------------------------------------------------------------------- common


def relative_rms(original: Tensor, decoded: Tensor) -> float:
    """sqrt(sum (original - decoded)^2 / sum original^2), accumulated in float64; 0.0 for two zero tensors."""
    if original.shape != decoded.shape:
        raise UsageError(
            f"shapes differ: {tuple(original.shape)} and {tuple(decoded.shape)}", hint="Compare equal shapes."
        )
    error = energy = 0.0
    left, right = original.detach().reshape(-1), decoded.detach().reshape(-1)
    for start in range(0, left.numel(), BLOCK):
        x = left[start : start + BLOCK].double()
        energy += float(x.dot(x))
        x.sub_(right[start : start + BLOCK].double())
        error += float(x.dot(x))
    if energy == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return math.sqrt(error / energy)


def _check_float(weight: Tensor) -> None:
    if weight.dtype not in _FLOATS:
        raise UsageError(
            f"a weight of dtype {weight.dtype} cannot be quantized", hint="Pass bfloat16, float16 or float32 weights."
        )


def _check_matrix(weight: Tensor) -> None:
    _check_float(weight)
    if weight.ndim != 2:
        raise UsageError(
            f"a weight of shape {tuple(weight.shape)} is not a matrix",
            hint="Quantize one projection [out, in] at a time.",
        )


def _check_finite(scales: Tensor) -> None:
    """NaN and infinity in a weight reach its scale, so the small tensor is enough to look at."""
    if not torch.isfinite(scales).all():
        raise InputError(
            "a weight holds NaN or infinity and cannot be quantized", hint="Repair or replace the source checkpoint."
        )
