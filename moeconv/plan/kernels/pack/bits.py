"""Codes of 1 to 7 bits, one after the other without gaps: code i of a row begins at bit i * bits, and may cross the end
of a word. Eight codes at a time are joined within one 64-bit number."""

from __future__ import annotations

import torch
from torch import Tensor

_LANES = (8, 16, 32)  # bits of the number that one code, two codes and four codes have to themselves


def join_bits(codes: Tensor, *, bits: int, out: Tensor) -> None:
    """uint8 `codes` below 2^bits, contiguous and in eights -> `out`, contiguous, of bits / 8 bytes per code."""
    eights = codes.view(torch.int64)
    for lane in _LANES:
        held = bits * lane // 8
        eights = (eights | (eights >> (lane - held))) & _mask(2 * held, 2 * lane)
    out.view(torch.uint8).view(-1, bits).copy_(eights.view(torch.uint8).view(-1, 8)[:, :bits])


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
    mask = sum(((1 << ones) - 1) << start for start in range(0, 64, lane))
    return mask - (1 << 64) if mask >> 63 else mask
