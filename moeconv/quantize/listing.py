"""The JSON of `moeconv formats`: the quantization formats, and the runtimes that load them."""

from __future__ import annotations

from collections.abc import Mapping

from moeconv.contract import FormatRow, Formats
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
