"""Balanced clusters of directions: spherical k-means with clusters of about equal size."""

from __future__ import annotations

import numpy as np

from moeconv.randomness import generator
from moeconv.upcycle.grouping import seeds

_ROUNDS = 25
_PRICES = 40  # price steps per round
_NEAR = 1.05  # largest load over the mean that counts as balanced


def balanced_centroids(vectors: np.ndarray, count: int, *, seed: int, layer: int) -> np.ndarray:
    """Centroids float32 [count, H] of length 1, for `vectors` float32 [n, H] of length 1 with n >= count.

    Vectors are assigned by an auction: the price of a cluster rises while it attracts more than its share, until the
    loads are even. The selection bias of DeepSeek-V3 (arXiv 2412.19437) balances experts in the same way."""
    draw = generator((seed, "centroids", layer))
    start = seeds(len(vectors), count, draw, lambda at: 2 - 2 * vectors @ vectors[at], least=1e-9)
    centroids = vectors[start]
    prices = np.zeros(count)
    for _ in range(_ROUNDS):
        scores = vectors @ centroids.T  # [n, count]
        chosen, prices = _auction(scores, prices)
        sums = np.zeros_like(centroids)
        np.add.at(sums, chosen, vectors)
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        moved = np.where(lengths > 0, sums / np.maximum(lengths, 1e-12), centroids)
        if np.abs(moved - centroids).max() < 1e-5:
            break
        centroids = moved
    return centroids.astype(np.float32)


def _auction(scores: np.ndarray, prices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the cluster of each vector int64 [n], the prices at which loads are nearly even)."""
    n, count = scores.shape
    step = float(scores.std()) or 1.0
    best: tuple[float, np.ndarray, np.ndarray] | None = None
    for _ in range(_PRICES):
        chosen = (scores - prices).argmax(1)
        load = np.bincount(chosen, minlength=count) * count / n
        if best is None or load.max() < best[0]:
            best = float(load.max()), chosen, prices
        if load.max() <= _NEAR:
            break
        prices = prices + step * (load - 1)
        step *= 0.85
    assert best is not None
    return best[1], best[2]
