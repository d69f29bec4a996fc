"""The JSON of `moeconv formats`: the quantization formats and which runtime loads them."""

from __future__ import annotations

from typing import Any

from moeconv.quantize.formats import BITS, FORMATS


def formats() -> dict[str, Any]:
    """The quantization formats and which runtime loads them."""
    rows = []
    for f in FORMATS.values():
        kinds = [(scheme, BITS[scheme], f.loads[scheme]) for scheme in f.schemes]
        for scheme, bits, loads in (*kinds, ("mixed bits by layer", None, f.mixed)):
            rows.append(
                {"name": f"{f.name} {scheme}", "format": f.name, "scheme": scheme, "bits": bits, "loads": dict(loads),
                 "notes": dict(f.notes)}
            )  # fmt: skip
    return {"formats": rows}
