"""The table of quantization formats, with one file per format; and the choice by --scheme, --bits and --group-size.

Formats are data over the kernels that pack. Sizes are pure arithmetic, so that a dry run states them to the byte. A new
format is one more line in FORMATS.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from moeconv.errors import InputError, UsageError, escape
from moeconv.options import parse_index
from moeconv.plugins import Registry
from moeconv.quantize.bitsandbytes import BITSANDBYTES
from moeconv.quantize.compressed_tensors import COMPRESSED_TENSORS
from moeconv.quantize.deepseek import DEEPSEEK
from moeconv.quantize.gguf.format import GGUF
from moeconv.quantize.gpt_oss import GPT_OSS
from moeconv.quantize.mlx import MLX
from moeconv.quantize.spec import MIXED, Format, Kernel, SchemeInfo

FORMATS = Registry(
    Format,
    "moeconv.formats",
    (
        COMPRESSED_TENSORS,
        BITSANDBYTES,
        DEEPSEEK,
        GPT_OSS,
        GGUF,
        MLX,
    ),
)
_USUAL = 4  # bits of the default scheme


def scheme_words() -> tuple[str, ...]:
    """The values of --scheme: every format's schemes, those with fewer bits first, and the word for bits by layer."""
    names = [info.name for f in FORMATS.values() for info in sorted(f.schemes, key=lambda info: info.bits)]
    return (*dict.fromkeys(names), MIXED)


def rest_words() -> tuple[str, ...]:
    """The values of --rest: the schemes of formats in which two schemes can stand beside each other, without those for
    which inputs are measured."""
    schemes = [info for f in FORMATS.values() if f.beside_loads for info in f.schemes]
    return tuple(dict.fromkeys(info.name for info in schemes if not (info.whole or info.inputs)))


def scheme_aliases() -> dict[str, str]:
    """Other words for schemes -> the scheme."""
    return {alias: info.name for f in FORMATS.values() for info in f.schemes for alias in info.aliases}


def help_words() -> dict[str, str]:
    """The parts of help texts that depend on the formats."""
    nesting = {f.name: [info.name for info in f.schemes if info.nests] for f in FORMATS.values()}
    return {
        "bits": _either(_widths()),
        "group_sizes": ", ".join(map(str, sorted(_sizes(info for f in FORMATS.values() for info in f.schemes)))),
        "nesting": ", ".join(f"{name} {' and '.join(schemes)}" for name, schemes in nesting.items() if schemes),
        "self_contained": ", ".join(f.name for f in FORMATS.values() if f.remote_code),
    }


def kernel_of(name: str) -> Kernel | None:
    """The record of a kernel that packs; None for any other kernel."""
    return next((kernel for f in FORMATS.values() for kernel in f.kernels if kernel.name == name), None)


def choose_scheme(format: Format, *, scheme: str | None, bits: int | None) -> SchemeInfo:
    """The scheme for --scheme or --bits. Without both it is the format's first scheme of 4 bits, or its first scheme
    where it has none of 4 bits. Raises UsageError where the two contradict each other, or the format does not have
    it."""
    if bits is not None and bits not in _widths():
        raise UsageError(f"--bits {bits} is not a width of any scheme", hint=f"Use {' or '.join(map(str, _widths()))}.")
    if scheme is None:
        return _of_bits(format, bits)
    known = [info for f in (format, *FORMATS.values()) for info in f.schemes if info.name == scheme]
    if bits is not None and (not known or known[0].bits != bits):
        raise UsageError(f"--bits {bits} contradicts --scheme {escape(scheme)}", hint="Give only one of the two.")
    if scheme not in format.names:
        fits = [f.name for f in FORMATS.values() if scheme in f.names]
        raise UsageError(
            f"--format {format.name} has no scheme {escape(scheme)}",
            hint=f"Use --format {fits[0]}." if fits else f"It has: {', '.join(format.names)}.",
        )
    return format.scheme(scheme)


def _of_bits(format: Format, bits: int | None) -> SchemeInfo:
    fits = [info for info in format.schemes if info.bits == (bits or _USUAL)]
    if fits or bits is None:
        return (*fits, *format.schemes)[0]
    others = [f.name for f in FORMATS.values() if any(info.bits == bits for info in f.schemes)]
    has = ", ".join(f"{info.name} ({info.bits} bits)" for info in format.schemes)
    raise UsageError(
        f"--format {format.name} has no scheme of {bits} bits", hint=f"It has {has}. Or use --format {_either(others)}."
    )


def choose_group(format: Format, info: SchemeInfo, text: str, widths: Sequence[int]) -> int | None:
    """The weights per scale for --group-size and these input widths; None for one scale per row. `auto` stands for the
    usual size of the scheme where it divides all widths, else for the largest size that does.

    Raises UsageError for a size that the scheme does not have, InputError for one that does not divide a width.
    """
    if not info.groups:
        if text != "auto":
            what = (
                f"--scheme {info.name}" if any(other.groups for other in format.schemes) else f"--format {format.name}"
            )
            raise UsageError(f"{what} does not use --group-size", hint="Leave --group-size out.")
        return None
    sizes = _sizes((info,))
    if text == "channel":
        if None not in info.groups:
            others = [other.name for other in format.schemes if None in other.groups]
            raise UsageError(
                f"--scheme {info.name} does not have --group-size channel"
                + (f", but {_either(others)} does" if others else ""),
                hint=f"Use --group-size auto with {info.name}.",
            )
        return None
    if text == "auto":
        for size in (info.usual, *sizes) if info.usual else sizes:
            if all(width % size == 0 for width in widths):
                return size
        raise InputError(
            f"none of the group sizes {', '.join(map(str, sizes))} divides all of the widths {sorted(set(widths))}",
            hint=_without_groups(format),
        )
    given = parse_index(text)
    if given is None or given not in sizes:
        raise UsageError(f"--group-size {escape(text)} is not auto, channel, {', '.join(map(str, sizes))}")
    bad = sorted({width for width in widths if width % given})
    if bad:
        raise InputError(f"--group-size {given} does not divide the width {bad[0]}", hint="Try --group-size auto.")
    return given


def fitting_groups(info: SchemeInfo, widths: Sequence[int]) -> list[int | None]:
    """The group sizes that divide every width, the largest first; [None] where the layout has no choice of sizes."""
    return [size for size in _sizes((info,)) if all(width % size == 0 for width in widths)] if info.groups else [None]


def _without_groups(format: Format) -> str:
    """The hint for weights with a width that no group size divides."""
    by_row = [f"--scheme {info.name} --group-size channel" for info in format.schemes if None in info.groups]
    fixed = [f"--format {f.name}" for f in in_place() if not any(info.groups for info in f.schemes)]
    return f"Use {', or '.join([*by_row, *fixed[:1]])}."


def in_place() -> Iterator[Format]:
    """The formats that keep the checkpoint's layout, in safetensors files."""
    return (f for f in FORMATS.values() if f.shard is None)


def _widths() -> list[int]:
    return sorted({info.bits for f in FORMATS.values() for info in f.schemes})


def _sizes(infos: Iterable[SchemeInfo]) -> list[int]:
    """All group sizes in weights, the largest first."""
    return sorted({size for info in infos for size in info.groups if size is not None}, reverse=True)


def _either(words: Iterable[object]) -> str:
    """a, b or c"""
    *front, last = map(str, words)
    return f"{', '.join(front)} or {last}" if front else last
