"""The quantization formats, a file each, in one table; and what --scheme, --bits and --group-size come to.

Formats are data over the pack kernels; sizes are pure arithmetic, so a dry run states them to the byte.
"""

from __future__ import annotations

from collections.abc import Sequence

from moeconv.errors import InputError, UsageError, escape
from moeconv.options import parse_index
from moeconv.plugins import Registry
from moeconv.quantize.bitsandbytes import BITSANDBYTES
from moeconv.quantize.compressed_tensors import COMPRESSED_TENSORS
from moeconv.quantize.gguf import GGUF
from moeconv.quantize.spec import Format, Scheme

GROUP_SIZES = (128, 64, 32)
BITS = {"int4": 4, "int8": 8, "nf4": 4, "fp4": 4, "q4_k": 4, "q4_0": 4, "q8_0": 8}
FORMATS = Registry(Format, "moeconv.formats", (COMPRESSED_TENSORS, BITSANDBYTES, GGUF))
MIXED = "mixed"  # the word of --scheme for bits that differ by layer


def scheme_words() -> tuple[str, ...]:
    """What --scheme takes: every format's schemes, the narrower first, and the word for bits by layer."""
    names = [scheme for f in FORMATS.values() for scheme in sorted(f.schemes, key=BITS.__getitem__)]
    return (*dict.fromkeys(names), MIXED)


def choose_scheme(format: Format, *, scheme: str | None, bits: int | None) -> str:
    """The scheme's name from --scheme or --bits. Raises UsageError when they contradict or the format lacks it."""
    if bits is not None and bits not in (4, 8):
        raise UsageError(f"--bits {bits}: only 4 and 8 are known")
    if scheme is None:
        return next(s for s in format.schemes if BITS[s] == (bits or 4))
    if bits is not None and BITS.get(scheme) != bits:
        raise UsageError(f"--bits {bits} contradicts --scheme {escape(scheme)}", hint="Give one of them.")
    if scheme not in format.schemes:
        fits = [f.name for f in FORMATS.values() if scheme in f.schemes]
        raise UsageError(
            f"--format {format.name} has no scheme {escape(scheme)}",
            hint=f"Use --format {fits[0]}." if fits else f"It has: {', '.join(format.schemes)}.",
        )
    return scheme


def choose_group(text: str, widths: Sequence[int]) -> int | None:
    """--group-size for weights of these input widths: auto takes the largest of 128, 64, 32 that divides them all.

    Raises UsageError for a word that is no size, InputError where a width is not divisible.
    """
    if text == "channel":
        return None
    if text == "auto":
        for size in GROUP_SIZES:
            if all(width % size == 0 for width in widths):
                return size
        raise InputError(
            f"no group size of {', '.join(map(str, GROUP_SIZES))} divides the widths {sorted(set(widths))}",
            hint="Use --scheme int8 --group-size channel, or --format bitsandbytes.",
        )
    given = parse_index(text)
    if given is None or given not in GROUP_SIZES:
        raise UsageError(f"--group-size {escape(text)}: not auto, channel, {', '.join(map(str, GROUP_SIZES))}")
    bad = sorted({width for width in widths if width % given})
    if bad:
        raise InputError(f"--group-size {given} does not divide width {bad[0]}", hint="Try --group-size auto.")
    return given


__all__ = ["BITS", "FORMATS", "Format", "Scheme", "choose_group", "choose_scheme"]
