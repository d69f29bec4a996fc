"""--scheme mixed: the schemes that it chooses from, and which options go with it. `budget.py` chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moeconv.errors import InputError, UsageError, escape
from moeconv.options import QuantizeOptions
from moeconv.quantize.formats import FORMATS, fitting_groups, scheme_aliases
from moeconv.quantize.spec import MIXED, Format, Scheme

USUAL = 4  # bits: narrower schemes are candidates only where the budget is too small for the others, or with --among


def offered(format: Format, among: str | None) -> list[tuple[str, ...]]:
    """The sets of schemes that layers choose from, in the order in which they are tried until one fits the budget.
    Raises UsageError for a scheme in `among` that the format cannot mix."""
    if among is not None:
        named = {recognised_scheme(word.strip()) for word in among.split(",")}
        known = (*format.mixes, *format.among)
        if unknown := sorted(named - {*known}):
            raise UsageError(
                f"--among {escape(unknown[0])} is not a scheme that --format {format.name} can mix",
                hint=f"It mixes: {', '.join(known)}.",
            )
        return [tuple(sorted((name for name in known if name in named), key=lambda name: format.scheme(name).bits))]
    usual = tuple(name for name in format.mixes if format.scheme(name).bits >= USUAL)
    return list(dict.fromkeys((usual, format.mixes)))


def recognised_scheme(word: str) -> str:
    """The scheme for a name or an alias."""
    return scheme_aliases().get(word, word)


def candidates(format: Format, widths: Sequence[int], names: Sequence[str], *, group: int | None) -> list[Scheme]:
    """The schemes that layers choose from, out of those of `names`, with the group sizes that divide every width: the
    last scheme, which has the most bits, with the largest one, the others with every one. `group` is the size that was
    asked for, None for all sizes; it leaves the schemes without a choice of sizes as they are.

    Raises InputError for a scheme of which no group size divides all widths."""
    found: list[Scheme] = []
    for name in names:
        info = format.scheme(name)
        sizes = [group] if group in info.groups and group else fitting_groups(info, widths)
        if not sizes:
            raise InputError(
                f"--among {name}: none of its group sizes divides all of the widths {sorted(set(widths))}",
                hint="Leave it out of --among.",
            )
        found += [Scheme(name, info.bits, size) for size in (sizes[:1] if name == names[-1] else sizes)]
    return found


def check_mixed(options: QuantizeOptions, format: Format, importance: Mapping[int, float] | None) -> None:
    """Raises UsageError for parameters that do not go together, and where the importance of the layers is missing."""
    if options.scheme != MIXED:
        _check_not_mixed(options)
        return
    _check_mixing(options, format)
    _check_budget(options)
    if importance is None:
        raise UsageError(
            "--scheme mixed needs --stats, from which it computes how important each layer is",
            hint="Make statistics: moeconv calibrate MODEL STATS --data FILE; then pass --stats STATS.",
        )


def _check_not_mixed(options: QuantizeOptions) -> None:
    """Raises UsageError for an option that only --scheme mixed reads."""
    mixing = (("--average-bits", options.average_bits), ("--max-bytes", options.max_bytes), ("--among", options.among))
    for flag, value in mixing:
        if value is not None:
            raise UsageError(f"{flag} needs --scheme mixed", hint="Add --scheme mixed --stats STATS.")
    if options.stats:
        raise UsageError("--stats needs --scheme mixed", hint="Leave --stats out: other schemes do not use it.")


def _check_budget(options: QuantizeOptions) -> None:
    if (options.average_bits is None) == (options.max_bytes is None):
        raise UsageError("--scheme mixed needs either --average-bits or --max-bytes", hint="Try --average-bits 5.")
    if options.average_bits is not None and not 0 < options.average_bits <= 32:
        raise UsageError(f"--average-bits {options.average_bits} must be above 0 and at most 32")


def _check_mixing(options: QuantizeOptions, format: Format) -> None:
    """Raises UsageError for a format, or for options of it, in which bits cannot differ by layer."""
    mixing = [f for f in FORMATS.values() if f.mixes]
    if not format.mixes:
        raise UsageError(
            f"--format {format.name} does not support --scheme mixed",
            hint=f"Use --format {' or '.join(f.name for f in mixing)}.",
        )
    if options.scope not in (None, "experts") or options.double_quant:
        flag = "--double-quant" if options.double_quant else f"--scope {options.scope}"
        raise UsageError(f"{flag} cannot be combined with --scheme mixed", hint=f"Leave {flag.split()[0]} out.")
    if format.shard is None and format.mixed.get("transformers") == "no" and not options.target:
        able = [runtime for runtime, word in format.mixed.items() if word == "ok"]
        others = [f.name for f in mixing if f.mixed.get("transformers") == "ok"]
        raise UsageError(
            f"transformers cannot load {format.name} with bits that differ by layer",
            hint=f"If another runtime loads the result, name it: --target {' or '.join(able)}. "
            f"Otherwise use --format {' or '.join(others)}.",
        )
