"""The checks of the numbers of an upcycle: experts, top-k, pieces of a copy, and the rows of a router."""

from __future__ import annotations

import math

from moeconv.errors import InputError, UsageError
from moeconv.families.spec import Family
from moeconv.options import UpcycleOptions
from moeconv.units import counted
from moeconv.upcycle.cut import Cut
from moeconv.upcycle.methods import METHODS


def check_numbers(options: UpcycleOptions, target: Family, cut: Cut) -> None:
    """Raises UsageError for numbers out of their range, and for a cut that the target cannot compute."""
    if not 1 <= cut.experts <= 4096:
        raise UsageError(f"--experts {cut.experts} must be from 1 to 4096")
    if not 1 <= cut.top_k <= cut.experts:
        raise UsageError(
            f"--top-k {cut.top_k} must be from 1 to the number of experts ({cut.experts})",
            hint="Lower --top-k or raise --experts.",
        )
    rule = target.experts.routing
    if rule is not None and cut.experts < rule.least:
        raise UsageError(
            f"--experts {cut.experts}: the router of {target.model_type} sums the scores of the best {rule.least} "
            "experts, and fails with fewer",
            hint=f"Pass --experts {rule.least} or more, or another target (--to).",
        )
    _check_cut(options, target, cut)
    fixed = rule.top_k if rule else None
    if fixed is not None and cut.top_k != fixed:
        raise UsageError(f"--top-k {cut.top_k}: {target.model_type} routes every token to {counted(fixed, 'expert')}")
    for name in ("drop_ratio", "noise_fraction"):
        if not 0 <= getattr(options, name) <= 1:
            raise UsageError(f"--{name.replace('_', '-')} must be from 0 to 1")
    for name in ("router_std", "noise_scale"):
        if not (math.isfinite(getattr(options, name)) and getattr(options, name) >= 0):
            raise UsageError(f"--{name.replace('_', '-')} must be a finite number from 0 up")


def _check_cut(options: UpcycleOptions, target: Family, cut: Cut) -> None:
    """Raises UsageError or InputError where the pieces of a copy would not add up to it."""
    if cut.pieces == 1:
        return
    if target.experts.routing and not target.experts.routing.equal:
        raise InputError(
            f"{target.model_type} gives experts with equal logits unequal weights, so that the pieces of a copy do not "
            "add up to it",
            hint="See `moeconv families` for other targets (--to), or leave --granularity out.",
        )
    for flag, value in (("--experts", cut.experts), ("--top-k", cut.top_k)):
        if METHODS[options.method].grouped and value % cut.pieces:
            more = -(-value // cut.pieces) * cut.pieces
            raise UsageError(
                f"{flag} {value} must be a multiple of the {cut.pieces} pieces that make up the routed FFN",
                hint=f"Try {flag} {more}.",
            )
    if cut.experts % cut.pieces:
        raise UsageError(
            f"--experts {cut.experts} must be a multiple of the {cut.pieces} pieces of a copy",
            hint=f"Try --experts {-(-cut.experts // cut.pieces) * cut.pieces}.",
        )


def check_router_rows(options: UpcycleOptions, target: Family, dtype: str) -> None:
    """Raises InputError where the rows of a router that splits an FFN would be zero in the dtype of the output."""
    if dtype == "F16" and "router.weight" not in target.tensors.float32:
        raise InputError(
            f"--method {options.method} writes router rows of about 1e-6, which float16, the dtype of the router of "
            f"{target.model_type}, rounds to zero",
            hint="Pass --dtype bfloat16 or float32.",
        )
