"""The JSON that bitsandbytes stores beside 4-bit codes, with a length that depends on the shape alone. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence

BNB_BLOCK = 64
NESTED_BLOCK = 256  # block size of double quantization, a constant in bitsandbytes' quantize_4bit
_OFFSET_WIDTH = 24  # length of the longest repr of a float: -2.2250738585072014e-308


def quant_state(
    shape: Sequence[int],
    *,
    dtype: str,
    quant_type: str,
    block_size: int = BNB_BLOCK,
    nested_offset: float | None = None,
) -> str:
    """The JSON that QuantState.as_dict(packed=True) stores; `dtype` is named as in torch.

    `nested_offset` is that of double quantization. It depends on the weight, so it is padded with spaces, which JSON
    allows: the plan knows the length before the weight is read.
    """
    fields = {"quant_type": quant_type, "blocksize": block_size, "dtype": dtype, "shape": list(shape)}
    if nested_offset is None:
        return json.dumps(fields)
    fields |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
    return f'{json.dumps(fields)[:-1]}, "nested_offset": {json.dumps(nested_offset):<{_OFFSET_WIDTH}}}}'
