"""The JSON of `moeconv formats`: the quantization formats, and the runtimes that load them. And which formats can store
a family."""

from __future__ import annotations

from collections.abc import Mapping

from moeconv.contract import FormatRow, Formats
from moeconv.families.spec import Family
from moeconv.quantize.formats import FORMATS
from moeconv.quantize.targets import every_runtime, versions


def formats() -> Formats:
    """The quantization formats, and the runtimes that load them."""
    rows: list[FormatRow] = []
    for f in FORMATS.values():
        kinds: list[tuple[str, int | None, Mapping[str, str], Mapping[str, Mapping[str, str]]]] = [
            (info.name, info.bits, info.loads, info.measured) for info in f.schemes
        ]
        if f.mixed:
            kinds.append(("mixed bits by layer", None, f.mixed, f.mixed_measured))
        for scheme, bits, loads, measured in kinds:
            rows.append(
                {"name": f"{f.name} {scheme}", "format": f.name, "scheme": scheme, "bits": bits,
                 "loads": every_runtime(loads), "measured": versions(measured), "notes": dict(f.notes)}
            )  # fmt: skip
    return {"formats": rows}


def formats_of(family: Family) -> list[str]:
    """The formats that can store a family, by its row; for a dense one those that store models without experts. A
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
