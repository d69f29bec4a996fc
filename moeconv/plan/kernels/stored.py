"""Raw bytes <-> torch tensors, with the dtype names of safetensors.

Imports torch; kernels and the measuring commands import this module lazily.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeconv.errors import InputError, escape

# dtype in safetensors -> dtype in torch, which has no F4 and F6
TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
SAFETENSORS_DTYPES: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def to_tensor(buffer: bytearray | memoryview, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor over `buffer` (raw little-endian bytes, writable), without a copy. Raises InputError for F4 and F6."""
    if dtype not in TORCH_DTYPES:
        raise InputError(f"torch has no dtype for {escape(dtype)}", hint="Convert the tensor to a supported dtype.")
    if not len(buffer):
        return torch.empty(shape, dtype=TORCH_DTYPES[dtype])
    return torch.frombuffer(buffer, dtype=TORCH_DTYPES[dtype]).view(shape)


def to_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes in order; no copy for a contiguous CPU tensor."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
