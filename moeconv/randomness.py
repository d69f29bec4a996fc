"""Random numbers that depend only on a key, and neither on the order of work nor on a global generator."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def generator(key: Sequence[object]) -> np.random.Generator:
    """A numpy generator (Philox) that is seeded by `key` alone, a sequence of numbers and strings."""
    digest = hashlib.sha256(repr(tuple(key)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], np.uint64)))
