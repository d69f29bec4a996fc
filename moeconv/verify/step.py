"""`moeconv verify` from start to end."""

from __future__ import annotations

from moeconv.checkpoint.hub import resolve
from moeconv.contract import Verified
from moeconv.plan.meter import Meter
from moeconv.requests import VerifyRequest


def verify(request: VerifyRequest, *, meter: Meter) -> Verified:
    """Check every byte of a checkpoint against its manifest, and its structure against its family. Raises InputError
    for one that cannot be opened."""
    from moeconv.verify.run import verify as check

    source = resolve(request.verify.source) if request.verify.source else None
    return check(resolve(request.model), source=source, load=request.verify.load, meter=meter)
