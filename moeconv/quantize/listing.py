"""The JSON of `moeconv formats`: the quantization formats, and the runtimes that load them. And which formats can store
a family."""

from __future__ import annotations

from collections.abc import Iterator

from moeconv.checkpoint.safetensors_file import TensorRef
from moeconv.contract import FormatRow, Formats
from moeconv.families.served import TARGETS
from moeconv.families.spec import Family
from moeconv.quantize.formats import FORMATS
from moeconv.quantize.spec import HARDWARE, MIXED, Format, Scheme, SchemeInfo
from moeconv.quantize.targets import every_runtime, versions


def places() -> tuple[str, ...]:
    """The values of `moeconv formats --for`: machines and runtimes."""
    return (*HARDWARE, *TARGETS)


def formats(place: str | None = None) -> Formats:
    """The quantization formats, and the runtimes that load them. With `place`, only those that load there, the smallest
    first."""
    rows = [row for f in FORMATS.values() for row in _rows(f)]
    if place is None:
        return {"place": None, "formats": rows}
    able = [row for row in rows if place in row["hardware"] or row["loads"].get(place) in ("ok", "dequantized")]
    able.sort(key=lambda row: (row["stored_bits"] or row["bits"] or 64, row["error"] or 0))
    return {"place": place, "formats": able}


def _rows(f: Format) -> Iterator[FormatRow]:
    for info in f.schemes:
        yield {
            "name": f"{f.name} {info.name}", "format": f.name, "scheme": info.name, "bits": info.bits,
            "loads": every_runtime(info.loads), "measured": versions(info.measured), "notes": dict(f.notes),
            "stored_bits": _stored_bits(f, info), "error": info.error,
            "hardware": list(info.hardware or f.hardware), "command": _command(f, info.name),
        }  # fmt: skip
    if f.mixed:
        yield {
            "name": f"{f.name} mixed bits by layer", "format": f.name, "scheme": "mixed bits by layer", "bits": None,
            "loads": every_runtime(f.mixed), "measured": versions(f.mixed_measured), "notes": dict(f.notes),
            "stored_bits": None, "error": None, "hardware": list(f.hardware),
            "command": _command(f, f"{MIXED} --average-bits 5 --stats STATS"),
        }  # fmt: skip


def _command(f: Format, scheme: str) -> str:
    return f"moeconv quantize MODEL OUT --format {f.name} --scheme {scheme}"


def _stored_bits(f: Format, info: SchemeInfo) -> float | None:
    """Bits per weight with scales, of a large matrix with the largest group."""
    if f.make is None:
        return None
    ref = TensorRef("x.weight", "BF16", (4096, 4096), "", 0, 2 * 4096 * 4096)
    item = f.make(ref, Scheme(info.name, info.bits, info.groups[0] if info.groups else None), "expert.up")
    return round(sum(spec.nbytes for spec in item.outputs) * 8 / 4096**2, 3)


def formats_of(family: Family) -> list[str]:
    """The formats that can store a family, by its row; for a dense family, those that store models without experts. A
    checkpoint may have settings that one of them cannot store."""
    if family.kind != "moe":
        return [f.name for f in FORMATS.values() if f.dense and f.takes(family)]
    flat = any(layout.flat for layout in family.tensors.packed.values())
    apart = any(not form.tensors.packed for form in family.forms())
    return [
        f.name
        for f in FORMATS.values()
        if f.takes(family)
        and (f.shard is not None or apart or f.form(family) is not None or (f.stack is not None and not flat))
        and not (f.form(family) is None and f.why_not(family))
    ]
