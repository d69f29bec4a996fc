"""Items that read a tensor in another dtype than the one that it is stored in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from moeconv.checkpoint.header import DTYPE_BITS
from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.plan.plan import Input, Item


def in_dtype(ref: TensorRef, dtype: str) -> TensorRef:
    """The tensor as it would be stored in another dtype."""
    return replace(ref, dtype=dtype, nbytes=math.prod(ref.shape) * DTYPE_BITS[dtype] // 8)


def cast_first(item: Item, stored: Mapping[str, TensorRef]) -> Item:
    """An item that is planned for tensors in another dtype, as one that reads them as they are `stored` and casts them
    first."""
    firsts, inputs = [], list[Input]()
    for ref in item.inputs:
        dtype = stored[ref.tensor].dtype
        size, wanted = DTYPE_BITS[dtype], DTYPE_BITS[ref.dtype]
        inputs.append(ref._replace(dtype=dtype, start=ref.start * size // wanted, nbytes=ref.nbytes * size // wanted))
        kernel = "copy" if dtype == ref.dtype else "cast"
        between = [ref.tensor, ref.dtype, list(ref.shape), 0, list(ref.shape)]
        firsts.append({"first": {"kernel": kernel, "params": {}}, "between": between, "count": 1})
    then = {"kernel": item.kernel, "params": dict(item.params)}
    if len(firsts) == 1:
        first = {key: value for key, value in firsts[0].items() if key != "count"}
        return replace(item, kernel="chain", inputs=tuple(inputs), params=first | {"then": then})
    return replace(item, kernel="gather", inputs=tuple(inputs), params={"firsts": firsts, "then": then})
