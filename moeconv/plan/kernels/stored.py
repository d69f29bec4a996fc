"""Bytes <-> torch tensors, and a stored weight's parts as the floats that they mean.

Imports torch: kernels and the measuring commands import this module, and those lazily.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moeconv.errors import InputError, escape

# dtype as safetensors names it -> torch's. F4 and F6 have no torch twin.
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
    return memoryview(flat.view(torch.uint8).numpy())


def decode_parts(parts: Mapping[str, Tensor], *, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """The float weight from what `read_parts` returned; `dtype` None is what its format decodes to.

    compressed-tensors decodes to its scales' dtype, bitsandbytes 4-bit to the dtype that was packed, row-wise INT8 and
    FP8 blocks to float32, MXFP4 to bfloat16: what stock runtimes compute with. Raises InputError for an incomplete or
    unknown packing.
    """
    parts = {key: value for key, value in parts.items() if key != ".input_scale"}
    if ".weight_packed" in parts:
        tensor = _decode_int(parts, name, dtype)
    elif set(parts) in _FLOATS:
        tensor = _decode_float(parts, name)
    elif any(key.endswith((".quant_state", ".scb")) for key in parts):
        from moeconv.plan.kernels.pack.stacked import unpack_stacked

        renamed = {key.removeprefix(".weight").removeprefix("."): value for key, value in parts.items()}
        tensor = unpack_stacked(renamed, name=name, dtype=dtype)
    elif any(key.startswith(".weight.quant_state") for key in parts):
        from moeconv.plan.kernels.pack import unpack_nf4

        renamed = {key.removeprefix(".weight").removeprefix("."): value for key, value in parts.items()}
        tensor = unpack_nf4(renamed, dtype=dtype)
    elif ".SCB" in parts and ".weight" in parts:
        from moeconv.plan.kernels.pack import unpack_int8_rowwise

        tensor = unpack_int8_rowwise({"": parts[".weight"], "SCB": parts[".SCB"]}, dtype=dtype or torch.float32)
    else:
        (tensor,) = parts.values() if len(parts) == 1 else (None,)
        if tensor is None or not tensor.is_floating_point():
            raise InputError(
                f"{escape(name)} is packed in a way that moeconv does not read ({', '.join(sorted(parts))})",
                hint="Give the unquantized checkpoint.",
            )
    return tensor if dtype is None else tensor.to(dtype)


_FLOATS: tuple[set[str], ...] = (
    {".weight", ".weight_scale_inv"},
    {".weight", ".weight_scale"},
    {"_blocks", "_scales"},
)


def _decode_float(parts: Mapping[str, Tensor], name: str) -> Tensor:
    from moeconv.plan.kernels.pack.floats import unpack_fp8, unpack_fp8_blocks, unpack_mxfp4

    try:
        if "_blocks" in parts:
            return unpack_mxfp4(parts["_blocks"], parts["_scales"])
        if ".weight_scale_inv" in parts:
            return unpack_fp8_blocks(parts[".weight"], parts[".weight_scale_inv"])
        return unpack_fp8(parts[".weight"], parts[".weight_scale"])
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"{escape(name)} does not decode: {escape(error)}",
            hint="The checkpoint is damaged, or its packing unknown.",
        ) from None


def _decode_int(parts: Mapping[str, Tensor], name: str, dtype: torch.dtype | None) -> Tensor:
    from moeconv.plan.kernels.pack import unpack_int

    missing = [key for key in (".weight_scale", ".weight_shape") if key not in parts]
    if missing:
        raise InputError(f"{escape(name)}: {missing[0]} is missing", hint="The checkpoint is incomplete.")
    words, shape = parts[".weight_packed"], parts[".weight_shape"].tolist()
    bits = words.shape[-1] * 32 // max(1, shape[-1])  # per tensor, so that layers may differ in width
    if words.ndim != 2 or len(shape) != 2 or words.shape[0] != shape[0] or bits not in (4, 8):
        raise InputError(
            f"{escape(name)}: words of shape {list(words.shape)} do not hold a weight of shape {shape}",
            hint="The checkpoint is damaged, or its packing is unknown.",
        )
    keys = ("weight_packed", "weight_scale", "weight_shape")
    return unpack_int({key: parts["." + key] for key in keys}, bits=bits, dtype=dtype)
