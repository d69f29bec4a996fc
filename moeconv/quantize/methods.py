"""What --method changes in a planned packing: nothing (rtn), searched scales (mse), or what data chose (BY_DATA)."""

from __future__ import annotations

import dataclasses

from moeconv.errors import UsageError
from moeconv.options import PlanOptions, QuantizeOptions, flag_of
from moeconv.plan.plan import Item
from moeconv.quantize.formats import FORMATS
from moeconv.quantize.spec import FOLDING, Format, SchemeInfo


def check_method(format: Format, method: str) -> None:
    """Raises UsageError for a method that no kernel of the format has."""
    if method in format.methods:
        return
    why = next((kernel.without[method] for kernel in format.kernels if method in kernel.without), "")
    others = [f.name for f in FORMATS.values() if method in f.methods]
    raise UsageError(
        f"--format {format.name} does not support --method {method}" + (f": {why}" if why else ""),
        hint=f"Use --method {' or '.join(format.methods)}"
        + (f", or --format {' or '.join(others)}." if others else "."),
    )


def check_reads(options: QuantizeOptions, common: PlanOptions, format: Format) -> None:
    """Raises UsageError for an option that neither the method nor the format uses."""
    usual = QuantizeOptions()
    for name in ("actorder", "damping"):
        if getattr(options, name) != getattr(usual, name) and options.method not in ("gptq", "auto"):
            raise UsageError(
                f"--method {options.method} does not use {flag_of(name)}",
                hint=f"Leave {flag_of(name)} out, or choose --method gptq.",
            )
    if options.split_size != usual.split_size and format.shard is None:
        raise UsageError(f"--format {format.name} does not use --split-size", hint="Use --shard-size.")
    if common.shard_size != PlanOptions().shard_size and format.shard is not None:
        raise UsageError(f"--format {format.name} does not use --shard-size", hint="Use --split-size.")


def check_scheme_method(format: Format, info: SchemeInfo, method: str) -> None:
    """Raises UsageError for a method that the kernel of a scheme does not have."""
    if method not in (has := format.methods_of(info)):
        others = [other.name for other in format.schemes if method in format.methods_of(other)]
        why = next((kernel.without.get(method, "") for kernel in format.kernels if kernel.name == info.kernel), "")
        if info.inputs and method in FOLDING:
            why = "its factors would change the inputs whose scales are measured"
        raise UsageError(
            f"--format {format.name} --scheme {info.name} does not support --method {method}"
            + (f": {why}" if why else ""),
            hint=f"Use --method {' or '.join(has)}, or --scheme {' or '.join(others)}.",
        )


def apply_method(item: Item, method: str, format: Format) -> Item:
    """The item with a method, before any overlay. Raises UsageError for a method that its kernel does not have."""
    kernel = next((kernel for kernel in format.kernels if kernel.name == item.kernel), None)
    if method == "rtn":
        return item
    if kernel is None or method not in kernel.methods:
        what = "" if kernel is None else kernel.without.get(method, "")
        raise UsageError(
            f"--format {format.name} does not support --method {method} for {item.outputs[0].name}"
            + (f": {what}" if what else ""),
            hint=f"Use --method {' or '.join(kernel.methods if kernel else ('rtn',))}.",
        )
    kernel.check(item, method)
    return dataclasses.replace(item, params={**item.params, "fit": True}) if kernel.fits else item
