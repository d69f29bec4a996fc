"""Loss and KL of pruned variants against the unpruned model, from one pass over the layers; no model is written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moeconv.evaluate.score import Score, score_window
from moeconv.prune.repair.pruned import pruned_pass
from moeconv.prune.repair.variant import Variant
from moeconv.stream.layers import LayerStream


def score_variants(
    stream: LayerStream,
    variants: Sequence[Variant],
    *,
    source: np.ndarray,
    num_sources: int,
    fit: np.ndarray | None = None,
) -> list[list[Score]]:
    """One Score per variant and data source, over the windows that `fit` bool [n] does not mark (over all windows if it
    is None). `source` int64 [n] is the data source of each window.

    `reference_loss` and `kl` compare with the unpruned model. Raises InputError as `pruned_pass` does.
    """
    pruned_pass(stream, variants, fit=fit)
    scores = [[Score() for _ in range(num_sources)] for _ in variants]
    for rows, logits in stream.tails([stream.hidden, *(v.hidden for v in variants)]):
        at = rows.start
        if fit is not None and fit[at]:
            continue
        for of_variant, theirs in zip(scores, logits[1:]):
            of_variant[int(source[at])].add(score_window(stream.windows[at], theirs[0], logits[0][0]))
    return scores


def total(scores: Sequence[Score]) -> Score:
    """The score over all sources together."""
    whole = Score()
    for score in scores:
        whole.add(score)
    return whole
