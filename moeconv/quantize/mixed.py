"""Bits by layer: the schemes whose error, weighted by what a layer matters, is least within a budget of bytes.

minimise sum_l importance_l * error(scheme_l) subject to sum_l bytes(scheme_l) <= budget (MC-MoE, arXiv 2410.06270, by
layer: no runtime loads bits that differ by expert). Greedy on each layer's lower convex hull; no torch, no bytes read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moeconv.errors import UsageError, escape
from moeconv.options import QuantizeOptions, parse_size
from moeconv.quantize.spec import Format, Scheme

# Squared error of Gaussian weights relative to their own square, measured by round-to-nearest. Other methods lower all
# of a layer's alike, which decides nothing.
_ERROR = {
    ("int4", 32): 0.0946**2, ("int4", 64): 0.1031**2, ("int4", 128): 0.1108**2,
    ("int8", 32): 0.0055**2, ("int8", 64): 0.0060**2, ("int8", 128): 0.0065**2, ("int8", None): 0.0091**2,
    ("nf4", None): 0.0927**2, ("bnb int8", None): 0.0078**2,
}  # fmt: skip
_CHOICES = {"compressed-tensors": ("int4", "int8"), "bitsandbytes": ("nf4", "int8")}


def expected_error(format: Format, scheme: Scheme) -> float:
    """Squared relative error that a scheme has on Gaussian weights."""
    name = "bnb int8" if format.name == "bitsandbytes" and scheme.name == "int8" else scheme.name
    return _ERROR[name, scheme.group]


def candidates(format: Format, groups: Sequence[int | None], bits: Mapping[str, int]) -> list[Scheme]:
    """The schemes that layers choose from. `groups` are the group sizes that divide every width, largest first."""
    four, eight = _CHOICES[format.name]
    sizes = groups if format.grouped else [None]
    return [*(Scheme(four, bits[four], g) for g in sizes), Scheme(eight, bits[eight], sizes[0])]


def hull(options: Sequence[tuple[int, float]]) -> list[int]:
    """Indices of the options (bytes, error) on the lower convex hull, from the smallest up, error falling."""
    order = sorted(range(len(options)), key=lambda i: (options[i][0], options[i][1]))
    kept: list[int] = []
    for i in order:
        if kept and options[i][1] >= options[kept[-1]][1]:
            continue
        while len(kept) > 1 and _slope(options, kept[-2], kept[-1]) <= _slope(options, kept[-1], i):
            kept.pop()
        if kept and options[i][0] == options[kept[-1]][0]:
            kept.pop()
        kept.append(i)
    return kept


def _slope(options: Sequence[tuple[int, float]], a: int, b: int) -> float:
    """Error that a byte saves between two options."""
    return (options[a][1] - options[b][1]) / max(1, options[b][0] - options[a][0])


def allocate(layers: Sequence[Sequence[tuple[int, float]]], budget: int) -> list[int] | None:
    """The index of each layer's option (bytes, error) for the least sum of errors within `budget` bytes, None when even
    the smallest do not fit. Upgrades go in the order of error saved by a byte; one that does not fit is passed over, so
    that the result misses the linear program's bound by less than one upgrade.
    """
    hulls = [hull(options) for options in layers]
    chosen = [h[0] for h in hulls]
    left = budget - sum(layers[i][c][0] for i, c in enumerate(chosen))
    if left < 0:
        return None
    steps = [(-_slope(layers[i], h[n], h[n + 1]), i, n) for i, h in enumerate(hulls) for n in range(len(h) - 1)]
    stopped: set[int] = set()
    for _, i, n in sorted(steps):
        cost = layers[i][hulls[i][n + 1]][0] - layers[i][hulls[i][n]][0]
        if i in stopped or cost > left:
            stopped.add(i)  # its further upgrades build on this one
            continue
        chosen[i], left = hulls[i][n + 1], left - cost
    return chosen


def check_mixed(options: QuantizeOptions, format: Format, importance: Mapping[int, float] | None) -> None:
    """Raises UsageError for parameters that do not go together, or missing statistics."""
    if options.scheme != "mixed":
        for flag, value in (("--average-bits", options.average_bits), ("--max-bytes", options.max_bytes)):
            if value is not None:
                raise UsageError(f"{flag} goes with --scheme mixed", hint="Add --scheme mixed --stats STATS.")
        if options.stats:
            raise UsageError("--stats goes with --scheme mixed", hint="Other schemes need no importance.")
        return
    if format.name not in _CHOICES:
        raise UsageError(
            f"--scheme mixed is not for --format {format.name}", hint=f"Use --format {' or '.join(_CHOICES)}."
        )
    if (options.average_bits is None) == (options.max_bytes is None):
        raise UsageError("--scheme mixed needs one of --average-bits and --max-bytes", hint="Try --average-bits 5.")
    if options.average_bits is not None and not 0 < options.average_bits <= 32:
        raise UsageError(f"--average-bits {options.average_bits} must lie between 0 and 32")
    if options.scope != "experts" or options.double_quant:
        flag = "--double-quant" if options.double_quant else f"--scope {options.scope}"
        raise UsageError(f"{flag} does not go with --scheme mixed", hint="Leave it out.")
    if format.mixed.get("transformers") == "no" and not options.target:
        raise UsageError(
            f"transformers cannot load {format.name} with bits that differ by layer",
            hint="Say which runtime will: --target vllm or sglang; or use --format bitsandbytes.",
        )
    if importance is None:
        raise UsageError(
            "--scheme mixed decides by the importance of the layers",
            hint="Make statistics: moeconv calibrate MODEL STATS --data FILE; then pass --stats STATS.",
        )


def byte_budget(options: QuantizeOptions, *, weights: int, beside: int) -> int:
    """Bytes for the experts' codes and scales: `weights` is how many they are, `beside` the bytes of all else."""
    if options.average_bits is not None:
        return int(options.average_bits * weights / 8)
    return parse_size(str(options.max_bytes), flag="--max-bytes") - beside


def too_small(options: QuantizeOptions, least: int, weights: int) -> UsageError:
    """The budget's error, with the least that is possible."""
    if options.average_bits is not None:
        return UsageError(
            f"--average-bits {options.average_bits}: the smallest scheme takes {least * 8 / weights:.3f}",
            hint="Give more, or a larger --group-size.",
        )
    return UsageError(f"--max-bytes {escape(options.max_bytes)}: too small", hint="Give more, or prune first.")


def merge_configs(parts: Mapping[Scheme, dict[str, Any]], schemes: Mapping[int, Scheme]) -> dict[str, Any]:
    """One quantization_config out of one for each scheme that layers have."""
    used = list(dict.fromkeys(schemes.values()))
    four = min(used, key=lambda s: s.bits)
    config = dict(parts[four])
    if "config_groups" in config:
        groups = {}
        for i, scheme in enumerate(used):
            layers = "|".join(str(layer) for layer, s in schemes.items() if s == scheme)
            (group,) = parts[scheme]["config_groups"].values()
            groups[f"group_{i}"] = group | {"targets": [rf"re:.*layers\.({layers})\..*experts\..*"]}
        return config | {"config_groups": groups}
    by_layer = {str(layer): s.name for layer, s in schemes.items()}
    return config | {"moeconv": config["moeconv"] | {"scheme": "mixed", "scheme_by_layer": by_layer}}
