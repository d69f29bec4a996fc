"""4-bit and 8-bit codes of all experts of a layer in one tensor. The codes of an expert depend only on its own
matrix."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moeconv.plan.kernels.pack.fourbit import decode_4bit, pack_nf4, read_quant_state, unnest_absmax
from moeconv.plan.kernels.pack.rowwise import decode_int8_rowwise
from moeconv.plan.kernels.states import quant_state


def pack_slice(weight: Tensor, *, block_size: int, quant_type: str, nested: bool) -> dict[str, Tensor]:
    """The slice of one expert: the tensors that `pack_nf4` makes of its `weight` [rows, columns], except that
    "quant_state" is the same for every expert, and "nested_offset" float32 [1] is a separate tensor."""
    parts = pack_nf4(weight, block_size=block_size, quant_type=quant_type, nested=nested)
    fields = read_quant_state(parts.pop(f"quant_state.bitsandbytes__{quant_type}"))
    if nested:
        parts["nested_offset"] = torch.tensor([fields["nested_offset"]], dtype=torch.float32)
    state = quant_state(weight.shape, dtype=fields["dtype"], quant_type=quant_type, block_size=block_size)
    return parts | {"quant_state": torch.tensor(list(state.encode()), dtype=torch.uint8)}


def unpack_stacked(parts: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> Tensor:
    """The weight [E, rows, columns] from the codes "" (with the experts along the first axis) and the other parts.

    `dtype` None stands for the dtype that was packed, and for float32 with row-wise INT8. Raises KeyError for a missing
    part, RuntimeError for a part with a wrong shape."""
    if "scb" in parts:
        return decode_int8_rowwise(parts[""], scb=parts["scb"], dtype=dtype or torch.float32)
    state = read_quant_state(parts["quant_state"])
    experts, (rows, columns) = parts[""].shape[0], state["shape"]
    size = state["blocksize"]
    codes, absmax = parts[""].reshape(experts, (rows * columns + 1) // 2), parts["absmax"]
    if "nested_offset" in parts:
        absmax = unnest_absmax(
            absmax,
            nested_absmax=parts["nested_absmax"],
            nested_quant_map=parts["nested_quant_map"],
            offset=parts["nested_offset"].reshape(experts),
        )
    absmax = absmax.reshape(experts, -(-rows * columns // size))
    to = dtype or getattr(torch, state["dtype"])
    result = torch.empty(experts, rows, columns, dtype=to)
    for expert in range(experts):
        values = decode_4bit(
            codes[expert], absmax=absmax[expert], quant_map=parts["quant_map"], count=rows * columns,
            block_size=size, dtype=to,
        )  # fmt: skip
        result[expert] = values.view(rows, columns)
    return result
