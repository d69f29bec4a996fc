"""The JSON of `moeconv families`: the supported families and conversions."""

from __future__ import annotations

from typing import Any

from moeconv.families.find import accepted
from moeconv.families.pairs import PAIRS
from moeconv.families.wrappers import WRAPPED


def families() -> dict[str, Any]:
    """The supported families and conversions."""
    pairs = [{"from": p.source, "to": p.target, "exact": p.exact, "default": p.default, "note": p.note} for p in PAIRS]
    around = {name: sorted(rows) for name, rows in sorted(WRAPPED.items())}
    taken = accepted()
    return {"dense": list(taken["dense"]), "moe": list(taken["moe"]), "multimodal": around, "pairs": pairs}
