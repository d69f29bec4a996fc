"""The held-out slice of a text that shapes weights: what was fitted on the rest is judged there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

EVERY = 16  # of so many windows the last one is held out
SHARE = 4  # of fewer windows the last tokens of each, one in so many
FEW_TOKENS = 512  # per expert, on average over a layer: with fewer, what is fitted is mostly noise


def held_out(windows: int, seq_len: int) -> np.ndarray:
    """Which tokens are held out, bool [windows, seq_len]; at least one is, and one is not, of `seq_len` >= 2."""
    held: np.ndarray = np.zeros((windows, seq_len), bool)
    if windows >= EVERY:
        held[EVERY - 1 :: EVERY] = True
    else:
        held[:, -max(1, seq_len // SHARE) :] = True
    return held


def few_tokens(per_expert: Mapping[int, float], *, what: str) -> list[str]:
    """A warning where layers have fewer than FEW_TOKENS tokens per expert; `per_expert` {layer: their mean}."""
    few = [layer for layer, mean in per_expert.items() if mean < FEW_TOKENS]
    if not few:
        return []
    least = min(per_expert.values())
    return [
        f"{what}: {least:.0f} tokens per expert on average in {layers_in_words(few)}, and {FEW_TOKENS} are the least "
        "that is advised: give more --data or --tokens"
    ]


def remarks_on(layers: Sequence[Mapping[str, Any]], *, what: str, kept: str) -> list[str]:
    """Warnings of what was fitted to text, by rows of {layer, tokens_per_expert, kept}: too little text, and layers
    where the fit erred more on held-out tokens; `kept` says what those have instead."""
    warnings = few_tokens({row["layer"]: row["tokens_per_expert"] for row in layers}, what=what)
    back = [row["layer"] for row in layers if not row["kept"]]
    if back:
        warnings.append(f"{what}: {layers_in_words(back)} keep {kept} err more on held-out tokens")
    return warnings


def layers_in_words(layers: Sequence[int]) -> str:
    """[3] -> layer 3; [0, 1, 2, 5] -> layers 0-2, 5"""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    words = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"layer {words}" if len(layers) == 1 else f"layers {words}"
