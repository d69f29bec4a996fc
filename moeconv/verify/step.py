"""The step verify."""

from __future__ import annotations

from typing import Any

from moeconv.checkpoint.hub import resolve
from moeconv.requests import VerifyRequest


def verify(request: VerifyRequest) -> dict[str, Any]:
    """Check every byte of a checkpoint against its manifest, and its structure against its family."""
    from moeconv.verify.run import verify as check

    against = request.verify.source
    return check(resolve(request.model), source=resolve(against) if against else None, load=request.verify.load)
