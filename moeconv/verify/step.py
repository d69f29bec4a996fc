"""`moeconv verify` from start to end."""

from __future__ import annotations

from moeconv.checkpoint.hub import resolve
from moeconv.contract import Verified
from moeconv.requests import VerifyRequest


def verify(request: VerifyRequest) -> Verified:
    """Check every byte of a checkpoint against its manifest, and its structure against its family. Raises InputError
    for one that cannot be opened."""
    from moeconv.verify.run import verify as check

    against = request.verify.source
    return check(resolve(request.model), source=resolve(against) if against else None, load=request.verify.load)
