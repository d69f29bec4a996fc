"""The 4-bit layout of bitsandbytes: NF4 and FP4 codes in blocks, with the bytes of `quantize_4bit` on the CPU."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeconv.errors import InputError, UsageError
from moeconv.plan.kernels.pack.common import BLOCK, check_finite, check_float
from moeconv.plan.kernels.states import BNB_BLOCK, NESTED_BLOCK, quant_state

_BNB_TINY = 1e-38  # the smallest absmax in bitsandbytes
_BNB_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

# QLoRA, arXiv 2305.14314, appendix E; and bitsandbytes' FP4 (sign, two exponent bits, one mantissa bit) in code order.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, 0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0)


def pack_nf4(
    weight: Tensor, *, block_size: int = BNB_BLOCK, quant_type: str = "nf4", nested: bool = False
) -> dict[str, Tensor]:
    """Quantize to bitsandbytes' NF4 or FP4, with the bytes of its `quantize_4bit` on the CPU, without importing it.

    `weight` has any shape, and the dtype bfloat16, float16 or float32. Returns tensors by the suffix that follows
    `weight` in a checkpoint: "" uint8 [ceil(n / 2), 1], with the first value in the high nibble; "absmax" float32
    [ceil(n / block_size)]; "quant_map" float32 [16]; "quant_state.bitsandbytes__nf4" (or __fp4) uint8, a JSON text.
    `nested` corresponds to compress_statistics (double quantization): "absmax" becomes uint8, and "nested_absmax"
    float32 [ceil(blocks / 256)] and "nested_quant_map" float32 [256] are added.

    Raises UsageError for a wrong block size, type or dtype, InputError for NaN or infinity in the weight.
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
        # bitsandbytes multiplies full blocks by 1 / absmax, but divides a shorter last block by absmax, with a minimum.
        values = flat[whole:].float()
        peak = values.abs().max().clamp(min=_BNB_TINY)
        absmax[-1] = peak
        codes = _codes_by_search(torch.clamp(values / peak, -1, 1), table)
        if codes.numel() % 2:
            codes = torch.cat([codes, _codes_by_search(torch.zeros(1), table)])
        packed[whole // 2 :, 0] = (codes[::2] << 4) | codes[1::2]
    check_finite(absmax)
    statistics, offset = {"absmax": absmax}, None
    if nested:
        statistics, offset = nest_absmax(absmax)
    dtype = str(weight.dtype).removeprefix("torch.")
    state = quant_state(weight.shape, dtype=dtype, quant_type=quant_type, block_size=block_size, nested_offset=offset)
    return {
        "": packed,
        **statistics,
        "quant_map": table.values.clone(),
        f"quant_state.bitsandbytes__{quant_type}": torch.tensor(list(state.encode()), dtype=torch.uint8),
    }


def nest_absmax(absmax: Tensor) -> tuple[dict[str, Tensor], float]:
    """Double quantization (QLoRA, arXiv 2305.14314). Returns (tensors, mean): 8-bit dynamic codes of absmax minus its
    mean, and the mean.

    Equal to bitsandbytes' `quantize_blockwise` on the CPU, which rounds a value to one of 65536 even steps, and takes
    the code that is nearest to the step.
    """
    offset = absmax.mean()
    if not torch.isfinite(offset):
        raise InputError("a weight is too large for double quantization", hint="Quantize without --double-quant.")
    values = absmax - offset
    peaks = torch.stack([block.abs().max() for block in torch.split(values, NESTED_BLOCK)])
    scaled = values * (1.0 / peaks).repeat_interleave(NESTED_BLOCK)[: values.numel()]
    steps = scaled.clamp_(-1, 1).add_(1.0).mul_(32767.5).add_(0.5).nan_to_num_(0.0).int()  # a zero block has code 0
    table = dynamic_map()
    codes = torch.bucketize(steps.double() * (2 / 65535) - 1, (table[:-1] + table[1:]) / 2).to(torch.uint8)
    return {"absmax": codes, "nested_absmax": peaks, "nested_quant_map": table.clone()}, offset.item()


def unnest_absmax(codes: Tensor, *, nested_absmax: Tensor, nested_quant_map: Tensor, offset: Tensor) -> Tensor:
    """The inverse of `nest_absmax`: `codes` uint8 [..., blocks], `nested_absmax` [..., ceil(blocks / 256)], `offset`
    [...] -> float32 in the shape of `codes`."""
    values = nested_quant_map[codes.int()]
    scales = nested_absmax.repeat_interleave(NESTED_BLOCK, dim=-1)[..., : codes.shape[-1]]
    return values.mul_(scales).add_(offset.unsqueeze(-1))


@functools.cache
def dynamic_map() -> Tensor:
    """bitsandbytes' signed 8-bit dynamic type (arXiv 1511.04561) as float32 [256], in ascending order."""
    values = [0.0, 1.0]
    for i in range(7):
        bounds = torch.linspace(0.1, 1, 2**i + 1)
        means = (10.0 ** (i - 6) * ((bounds[:-1] + bounds[1:]) / 2)).tolist()
        values += [sign * mean for mean in means for sign in (1, -1)]
    return torch.tensor(sorted(values))


def unpack_nf4(packed: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> Tensor:
    """Decode the tensors of `pack_nf4` to the original shape, equal to bitsandbytes' `dequantize_4bit`.

    With `dtype` None, the result has the dtype that was packed. Raises InputError for a missing or damaged state.
    """
    keys = [key for key in packed if key.startswith("quant_state.bitsandbytes__")]
    if len(keys) != 1 or any(key not in packed for key in ("", "absmax", "quant_map")):
        raise InputError(
            f"a 4-bit weight needs absmax, quant_map and one quant_state, found {sorted(packed)}",
            hint="The checkpoint is incomplete; quantize it again.",
        )
    state = read_quant_state(packed[keys[0]])
    shape = state["shape"]
    count = math.prod(shape)
    blocks = -(-count // state["blocksize"])
    whole = packed[""].numel() == (count + 1) // 2 and packed["absmax"].numel() == blocks
    if "nested_offset" in state:
        sizes = [packed[key].numel() if key in packed else 0 for key in ("nested_absmax", "nested_quant_map")]
        whole = whole and sizes == [-(-blocks // NESTED_BLOCK), 256]
    if not whole:
        raise InputError(
            f"a 4-bit weight of shape {shape} has {packed[''].numel()} bytes and {packed['absmax'].numel()} scales",
            hint="The checkpoint is damaged; quantize it again.",
        )
    absmax = packed["absmax"]
    if "nested_offset" in state:
        absmax = unnest_absmax(
            absmax,
            nested_absmax=packed["nested_absmax"],
            nested_quant_map=packed["nested_quant_map"],
            offset=torch.tensor(state["nested_offset"], dtype=torch.float32),
        )
    values = decode_4bit(
        packed[""].reshape(-1),
        absmax=absmax,
        quant_map=packed["quant_map"],
        count=count,
        block_size=state["blocksize"],
        dtype=dtype or getattr(torch, state["dtype"]),
    )
    return values.view(shape)


def read_quant_state(state: Tensor) -> dict[str, Any]:
    """The JSON of `quant_state.bitsandbytes__*`: quant_type, blocksize, dtype, shape. Raises InputError for anything
    else."""
    try:
        fields: dict[str, Any] = json.loads(bytes(state.cpu().numpy()))
        known = {"quant_type": str, "blocksize": int, "dtype": str, "shape": list}
        if not all(isinstance(fields[key], kind) for key, kind in known.items()):
            raise ValueError("a field of the wrong type")
        if fields["dtype"] not in ("bfloat16", "float16", "float32") or fields["blocksize"] not in _BNB_BLOCK_SIZES:
            raise ValueError("an unknown dtype or blocksize")
        if not all(type(size) is int and size > 0 for size in fields["shape"]):
            raise ValueError("a shape that is not of positive integers")
        nested = {key: fields[key] for key in fields if key.startswith("nested_")}
        if nested:
            offset = nested.pop("nested_offset")
            if nested != {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"} or type(offset) is not float:
                raise ValueError("double quantization of another kind")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"a 4-bit weight's quant_state is not bitsandbytes' JSON: {error}", hint="Quantize the checkpoint again."
        ) from None
    return fields


def decode_4bit(
    packed: Tensor, *, absmax: Tensor, quant_map: Tensor, count: int, block_size: int, dtype: torch.dtype
) -> Tensor:
    """`packed` uint8 [ceil(count / 2)], `absmax` float32 [ceil(count / block_size)] -> `dtype` [count], on any device.

    A byte is looked up as a pair of float32 values, so that there is one lookup per two values.
    """
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


class _Table4Bit:
    """One 4-bit type: its 16 values, the midpoints between them in ascending order, and a lookup table over [-1, 1].

    A value v in [-1, 1] is in bin trunc(v * 2^14 + 2^14). `lookup` holds the code of each bin, or FLAG if a midpoint is
    inside the bin. That is the case for about one value in two thousand, which is then searched for exactly.
    """

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
    check_finite(peak)
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
    mask = at.numpy().view(np.bool_)[
        : codes.numel()
    ]  # `at` is no longer needed; numpy finds flags ten times faster than torch
    unsure = np.flatnonzero(np.greater_equal(codes.numpy(), table.FLAG, out=mask))
    if unsure.size:
        place = torch.from_numpy(unsure)
        exact = x.view(-1)[place] * inverse[place // x.shape[1]]
        codes[place] = _codes_by_search(exact, table)


def _codes_by_search(values: Tensor, table: _Table4Bit) -> Tensor:
    """The exact rule: the code is the number of midpoints strictly below the value, in the order of the values."""
    return table.order[torch.bucketize(values, table.midpoints)]


def _join_high_first(codes: Tensor, pairs: Tensor, octets: Tensor) -> None:
    """Join uint8 codes below 16 in pairs, with the first in the high nibble, into `octets` uint8 [n / 2]."""
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
    check_float(weight)
