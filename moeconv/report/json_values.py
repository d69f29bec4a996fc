"""Reading JSON objects that anybody may have edited: what is of another kind than expected counts as absent."""

from __future__ import annotations

import math
from collections.abc import Mapping

from moeconv.report.types import Number


def rows(value: object) -> list[Mapping[str, object]]:
    """The objects in a list; empty for anything else."""
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []


def mapping(value: object) -> Mapping[str, object]:
    """An object; empty for anything else."""
    return value if isinstance(value, Mapping) else {}


def number(value: object) -> Number:
    """A finite number; None for anything else."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if good and isinstance(value, int | float) else None


def texts(value: object) -> list[str]:
    """The strings in a list; empty for anything else."""
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []
