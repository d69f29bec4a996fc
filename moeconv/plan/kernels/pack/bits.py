"""Codes of 1 to 7 bits, one after the other without gaps: code i of a row begins at bit i * bits, and may cross the end
of a word. Eight codes at a time are joined within one 64-bit number."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moeconv.plan.kernels.pack.common import SCRATCH

_LANES = (8, 16, 32)  # bits of the number that one code, two codes and four codes have to themselves


def join_bits(codes: Tensor, *, bits: int, out: Tensor) -> None:
    """uint8 `codes` below 2^bits, contiguous and in eights -> `out`, contiguous, of bits / 8 bytes per code."""
    if bits == 2:
        _join_pairs(codes, out)
        return
    eights = codes.view(-1).view(torch.int64)
    joined = SCRATCH("eights", eights.shape, torch.int64)
    upper = SCRATCH("upper", eights.shape, torch.int64).numpy()
    into = joined.numpy()
    source = eights.numpy()
    for lane in _LANES:
        held = bits * lane // 8
        low = _mask(held, 2 * lane)
        np.right_shift(source, lane - held, out=upper)
        np.bitwise_and(upper, _signed(low << held), out=upper)
        np.bitwise_and(source, low, out=into)
        source = np.bitwise_or(into, upper, out=into)
    eights = joined
    if bits == 3 and len(eights) % 4 == 0:
        _join_words(eights, out)
        return
    out.view(torch.uint8).view(-1, bits).copy_(eights.view(torch.uint8).view(-1, 8)[:, :bits])


def _join_pairs(codes: Tensor, out: Tensor) -> None:
    """`join_bits` of 2 bits: four codes within a 32-bit number, whose low byte is kept."""
    fours = codes.view(-1).view(torch.int32).numpy()
    shifted = SCRATCH("shifted", fours.shape, torch.int32).numpy()
    joined = SCRATCH("joined", fours.shape, torch.int32).numpy()
    np.right_shift(fours, 6, out=joined)
    np.bitwise_or(joined, fours, out=joined)
    for places in (12, 18):
        np.right_shift(fours, places, out=shifted)
        np.bitwise_or(joined, shifted, out=joined)
    out.view(torch.uint8).view(-1).copy_(torch.from_numpy(joined))


def _join_words(eights: Tensor, out: Tensor) -> None:
    """Numbers of 24 bits, four at a time, to three 32-bit words."""
    a, b, c, d = eights.view(-1).to(torch.int32).view(-1, 4).numpy().T
    words = out.view(torch.int32).view(-1, 3).numpy()
    words[:, 0] = a | b << 24
    words[:, 1] = b >> 8 | c << 16
    words[:, 2] = c >> 16 | d << 8


def split_bits(words: Tensor, *, bits: int) -> Tensor:
    """The codes in contiguous memory of bits / 8 bytes per code, as `join_bits` makes it: uint8, flat."""
    octets = words.view(torch.uint8).view(-1, bits)
    eights = torch.zeros(len(octets), 8, dtype=torch.uint8)
    eights[:, :bits] = octets
    numbers = eights.view(torch.int64).view(-1)
    for lane in reversed(_LANES):
        held = bits * lane // 8
        numbers = (numbers | (numbers << (lane - held))) & _mask(held, lane)
    return numbers.view(torch.uint8)


def _mask(ones: int, lane: int) -> int:
    """`ones` low bits in each lane of a 64-bit number, as a signed number."""
    return _signed(sum(((1 << ones) - 1) << start for start in range(0, 64, lane)))


def _signed(mask: int) -> int:
    """64 bits as a signed number."""
    mask &= (1 << 64) - 1
    return mask - (1 << 64) if mask >> 63 else mask
