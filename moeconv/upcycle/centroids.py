"""Balanced clusters of directions: spherical k-means in which every cluster gets about as many vectors as any other."""

from __future__ import annotations

import numpy as np

from moeconv.randomness import generator
from moeconv.upcycle.grouping import seeds

_ROUNDS = 25
_PRICES = 40  # price steps a round
_NEAR = 1.05  # largest load over the mean that counts as balanced


def balanced_centroids(vectors: np.ndarray, count: int, *, seed: int, layer: int) -> np.ndarray:
    """`vectors` float32 [n, H] of length 1 -> centroids float32 [count, H] of length 1, n >= count.

    Assignment is an auction: a cluster that attracts more than its share gets dearer until loads are even, as the
    selection bias of DeepSeek-V3 (arXiv 2412.19437) evens out experts."""
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
