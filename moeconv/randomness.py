"""Random numbers that only their key decides: never the order of work, nor a global generator."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np


def generator(key: Sequence[Any]) -> np.random.Generator:
    """A numpy generator that only `key` (numbers and words) decides."""
    digest = hashlib.sha256(repr(tuple(key)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], np.uint64)))
