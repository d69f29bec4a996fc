"""One-to-one assignment, which merging, similarity and balanced groups of neurons share."""

from __future__ import annotations

import numpy as np


def assignment(worth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows, ascending, and columns of the assignment with the largest sum of `worth` [n, m], int64 [min(n, m)] each.

    The Hungarian method, by scipy (Crouse 2016); among equal sums it takes the same one each time."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(worth, maximize=True)
    return rows, columns
