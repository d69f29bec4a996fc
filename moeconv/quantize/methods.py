"""What --method makes of a planned packing: rtn leaves it, mse fits its scales, gptq takes an overlay's codes."""

from __future__ import annotations

import dataclasses

from moeconv.errors import UsageError
from moeconv.plan.plan import Item

_FITTED = ("pack_int",)  # kernels that can fit their scales (parameter `fit`)
_FREE = ("pack_int", "pack_bnb4", "pack_bnb4_slice", "pack_bnb8")  # layouts whose codes data can choose


def apply_method(item: Item, method: str) -> Item:
    """The item under a method, before any overlay. Raises UsageError for a method that its layout does not have."""
    if method == "rtn" or item.kernel not in (*_FITTED, *_FREE):
        return item
    if method == "gptq" and (item.kernel not in _FREE or item.params.get("nested")):
        raise UsageError(
            "--method gptq chooses the scales itself, which --double-quant would round again", hint="Leave one out."
        )
    if method == "gptq" and item.kernel == "pack_bnb4" and item.inputs[0].shape[1] % item.params["block_size"]:
        raise UsageError(
            f"--method gptq needs rows of whole blocks: width {item.inputs[0].shape[1]}, "
            f"blocks of {item.params['block_size']}",
            hint="Use --method rtn, or --format compressed-tensors.",
        )
    if item.kernel in _FITTED:
        return dataclasses.replace(item, params={**item.params, "fit": True})
    if method == "mse":
        raise UsageError(
            "--method mse is for compressed-tensors: bitsandbytes' scale is the block's largest magnitude",
            hint="Use --method rtn or gptq, or --format compressed-tensors.",
        )
    return item
