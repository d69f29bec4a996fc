"""Chooses what decodes 4-bit codes on a device: bitsandbytes' kernel on CUDA, and moeconv's own code elsewhere.

bitsandbytes is used on a device only after its kernel has given the bits of moeconv's own code there, on a sample
that has every code, both types and all dtypes. What the device is asked once, `theirs` remembers.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from moeconv.plan.kernels.pack.fourbit import decode_4bit, pack_nf4

# A module of bitsandbytes, which has no types.
Theirs: TypeAlias = Any

KERNELS_ON = {"cuda"}  # the types of devices whose kernels are asked for
_TYPES = ("nf4", "fp4")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_NAMES: WeakIdKeyDictionary = WeakIdKeyDictionary()  # a table of values -> (its version, the type's name)


def decode_four(
    octets: Tensor, *, absmax: Tensor, quant_map: Tensor, count: int, block_size: int, dtype: torch.dtype
) -> Tensor:
    """`decode_4bit`, by the kernel of the device: the same arguments and the same bits."""
    kernels = None if torch.compiler.is_compiling() else theirs(octets.device)
    kind = type_of(quant_map) if kernels is not None and dtype in _DTYPES and count % block_size == 0 else None
    if kind is None:  # another device, type or dtype, or a last block that is shorter
        return decode_4bit(
            octets, absmax=absmax, quant_map=quant_map, count=count, block_size=block_size, dtype=dtype
        )  # fmt: skip
    return _decoded(kernels, octets, absmax, kind=kind, count=count, block_size=block_size, dtype=dtype)


@functools.cache
def theirs(device: torch.device) -> Theirs | None:
    """`bitsandbytes.functional` where its kernel decodes on this device what moeconv's own code does; else None."""
    if device.type not in KERNELS_ON:
        return None
    try:
        kernels = importlib.import_module("bitsandbytes.functional")
        return kernels if _same_bits(kernels, device) else None
    except (ImportError, RuntimeError, OSError, AttributeError, NotImplementedError):
        return None  # not installed, built without kernels for this device, or of another version


@functools.cache
def _tables() -> dict[str, Tensor]:
    return {kind: pack_nf4(torch.zeros(1, 64), quant_type=kind)["quant_map"] for kind in _TYPES}


def type_of(quant_map: Tensor) -> str | None:
    """The name of the 4-bit type with this table of values, float32 [16]: nf4, fp4, or None for another one. The
    answer is kept, because the table may lie on a GPU."""
    version = None if quant_map.is_inference() else quant_map._version  # noqa: SLF001 (counts changes in place)
    held = _NAMES.get(quant_map)
    if held is None or held[0] != version or version is None:
        values = quant_map.cpu().float()
        held = version, next((kind for kind, table in _tables().items() if torch.equal(table, values)), None)
        _NAMES[quant_map] = held
    name: str | None = held[1]
    return name


def _decoded(
    kernels: Theirs, octets: Tensor, absmax: Tensor, *, kind: str, count: int, block_size: int, dtype: torch.dtype
) -> Tensor:
    state = kernels.QuantState(absmax.float(), (count,), blocksize=block_size, quant_type=kind, dtype=dtype)
    decoded: Tensor = kernels.dequantize_4bit(octets.reshape(-1, 1), state)
    return decoded.reshape(count)


def _same_bits(kernels: Theirs, device: torch.device) -> bool:
    """Whether bitsandbytes decodes a sample to the bits of `decode_4bit`: all 256 bytes under each of 64 scales."""
    octets = torch.arange(256, dtype=torch.uint8, device=device).repeat(64)
    scales = torch.logspace(-6, 4, 64, device=device).mul(1.2345).repeat_interleave(512 // 64)
    for kind, dtype in itertools.product(_TYPES, _DTYPES):
        table = _tables()[kind].to(device)
        ours = decode_4bit(octets, absmax=scales, quant_map=table, count=512 * 64, block_size=64, dtype=dtype)
        found = _decoded(kernels, octets, scales, kind=kind, count=512 * 64, block_size=64, dtype=dtype)
        if not torch.equal(ours.view(torch.uint8), found.view(torch.uint8)):
            return False
    return True
