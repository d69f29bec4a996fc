"""What --method makes of a planned packing: rtn leaves it, mse fits its scales, gptq takes an overlay's codes."""

from __future__ import annotations

import dataclasses

from moeconv.errors import UsageError
from moeconv.plan.plan import Item
from moeconv.quantize.formats import FORMATS
from moeconv.quantize.spec import Format


def check_method(format: Format, method: str) -> None:
    """Raises UsageError for a method that none of a format's kernels has, with those that it has."""
    if method in format.methods:
        return
    why = next((kernel.without[method] for kernel in format.kernels if method in kernel.without), "")
    others = [f.name for f in FORMATS.values() if method in f.methods]
    raise UsageError(
        f"--method {method} is not for --format {format.name}" + (f": {why}" if why else ""),
        hint=f"Use --method {' or '.join(format.methods)}"
        + (f", or --format {' or '.join(others)}." if others else "."),
    )


def apply_method(item: Item, method: str, format: Format) -> Item:
    """The item under a method, before any overlay. Raises UsageError for a method that its kernel does not have."""
    kernel = next((kernel for kernel in format.kernels if kernel.name == item.kernel), None)
    if method == "rtn":
        return item
    if kernel is None or method not in kernel.methods:
        what = "" if kernel is None else kernel.without.get(method, "")
        raise UsageError(
            f"--method {method} is not for {item.outputs[0].name} in --format {format.name}"
            + (f": {what}" if what else ""),
            hint=f"Use --method {' or '.join(kernel.methods if kernel else ('rtn',))}.",
        )
    kernel.check(item, method)
    return dataclasses.replace(item, params={**item.params, "fit": True}) if kernel.fits else item
