"""One-to-one assignment, used by merging, similarity and balanced groups of neurons."""

from __future__ import annotations

import numpy as np


def assignment(worth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The assignment with the largest sum of `worth` [n, m]: (ascending rows, columns), int64 [min(n, m)] each.

    Computed by scipy (Crouse 2016, a variant of the Hungarian method). Among equal sums the choice is deterministic.
    """
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(worth, maximize=True)
    return rows, columns
