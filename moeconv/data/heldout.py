"""The held-out slice of a text that shapes weights: what was fitted on the rest of the text is compared on this slice,
and kept only if it is clearly better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from moeconv.types import Config
from moeconv.units import counted

EVERY = 16  # the last of every 16 windows is held out
SHARE = 4  # of fewer windows, the last quarter of the tokens of each is held out
FEW_TOKENS = 512  # per expert, averaged over a layer; with fewer, the fit is mostly noise
_ERRORS = 2  # standard errors by which a fit must be better


def held_out(windows: int, seq_len: int) -> np.ndarray:
    """Which tokens are held out, bool [windows, seq_len]. For `seq_len` >= 2, at least one token is and one is not."""
    held: np.ndarray = np.zeros((windows, seq_len), bool)
    if windows >= EVERY:
        held[EVERY - 1 :: EVERY] = True
    else:
        held[:, -max(1, seq_len // SHARE) :] = True
    return held


def clearly_less(new: ArrayLike, old: ArrayLike) -> bool:
    """Whether errors per held-out token, [n] each, fell: their mean difference is above two standard errors. A fit that
    is better by chance on a few held-out tokens is as often as not worse on other text."""
    gain = np.asarray(old, np.float64) - np.asarray(new, np.float64)
    return len(gain) > 1 and bool(gain.mean() > _ERRORS * gain.std(ddof=1) / len(gain) ** 0.5)


def few_tokens(per_expert: Mapping[int, float], *, what: str) -> list[str]:
    """A warning if layers have fewer than FEW_TOKENS tokens per expert. `per_expert` is {layer: mean tokens per
    expert}."""
    few = [layer for layer, mean in per_expert.items() if mean < FEW_TOKENS]
    if not few:
        return []
    least = min(per_expert.values())
    return [
        f"{what}: {counted(round(least), 'token')} per expert on average in {layers_in_words(few)}, and at "
        f"least {FEW_TOKENS} are advised: give more --data or --tokens"
    ]


def remarks_on(layers: Sequence[Config], *, what: str, kept: str, fitted: str) -> list[str]:
    """Warnings of what was fitted to text, by rows of {layer, tokens_per_expert, tokens_needed, kept}: too little text,
    and layers where the fit is not clearly better on held-out tokens. `kept` names what those layers use instead of
    what was `fitted`."""
    warnings = few_tokens({row["layer"]: row["tokens_per_expert"] for row in layers}, what=what)
    short = {row["layer"]: row["tokens_needed"] for row in layers if row["tokens_per_expert"] < row["tokens_needed"]}
    if short:
        warnings.append(
            f"{what}: {layers_in_words([*short])} keep {kept}: the text is too little to fit anything to, at least "
            f"{max(short.values())} tokens per expert"
        )
    back = [row["layer"] for row in layers if not row["kept"] and row["layer"] not in short]
    if back:
        warnings.append(
            f"{what}: {layers_in_words(back)} keep {kept}, because {fitted} are not clearly better on held-out tokens"
        )
    return warnings


def layers_in_words(layers: Sequence[int]) -> str:
    """A list of layers as text: [3] gives "layer 3", and [0, 1, 2, 5] gives "layers 0-2, 5"."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    words = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"layer {words}" if len(layers) == 1 else f"layers {words}"
