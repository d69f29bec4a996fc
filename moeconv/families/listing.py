"""The JSON of `moeconv families`: the supported families and conversions."""

from __future__ import annotations

from moeconv.families.find import accepted
from moeconv.families.registry import tables
from moeconv.types import JsonObject


def families() -> JsonObject:
    """The supported families and conversions."""
    known = tables()
    pairs = [
        {"from": p.source, "to": p.target, "exact": True, "default": p.default, "note": p.note} for p in known.pairs
    ]
    around = {name: sorted(rows) for name, rows in sorted(known.wrapped.items())}
    taken = accepted()
    return {"dense": list(taken["dense"]), "moe": list(taken["moe"]), "multimodal": around, "pairs": pairs}
