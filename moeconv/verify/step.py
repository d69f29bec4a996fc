"""The step verify."""

from __future__ import annotations

from typing import Any

from moeconv.checkpoint.hub import resolve


def verify(source: str, *, against: str | None, load: bool) -> dict[str, Any]:
    """Check every byte of a checkpoint against its manifest, and its structure against its family."""
    from moeconv.verify.run import verify as check

    return check(resolve(source), source=resolve(against) if against else None, load=load)
