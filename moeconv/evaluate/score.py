"""From logits to figures: loss, KL divergence and top-1 agreement of one window, in nats, summed in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK_BYTES = 1 << 25  # float32 log-probabilities held at a time


@dataclass
class Score:
    """Sums over the predicted tokens, in nats. `kl` is KL(reference || model); `agree` counts the positions where both
    models have the same most likely token."""

    tokens: int = 0
    loss: float = 0.0
    reference_loss: float = 0.0
    kl: float = 0.0
    agree: int = 0

    def add(self, other: Score) -> None:
        for name in ("tokens", "loss", "reference_loss", "kl", "agree"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def mean(self, field: str) -> float:
        """The mean of a sum over the predicted tokens; NaN where there are none."""
        return getattr(self, field) / self.tokens if self.tokens else float("nan")


@torch.no_grad()
def score_window(ids: Tensor, logits: Tensor, reference: Tensor | None = None) -> Score:
    """Score one window: `ids` int64 [S], `logits` and `reference` [S, V]. Each of the first S - 1 positions predicts
    the token after it; what the last position predicts is not in the window, so it is not scored."""
    score = Score(tokens=len(ids) - 1)
    step = max(1, _CHUNK_BYTES // (4 * logits.shape[-1]))
    for start in range(0, score.tokens, step):
        rows = slice(start, min(start + step, score.tokens))
        wanted = ids[rows.start + 1 : rows.stop + 1].to(logits.device)[:, None]
        logs = torch.log_softmax(logits[rows].float(), dim=-1)
        score.loss -= float(logs.gather(1, wanted).double().sum())
        if reference is None:
            continue
        theirs = torch.log_softmax(reference[rows].float(), dim=-1)
        score.reference_loss -= float(theirs.gather(1, wanted).double().sum())
        score.agree += int((logs.argmax(-1) == theirs.argmax(-1)).sum())
        score.kl += float((theirs.exp() * (theirs - logs)).sum(-1, dtype=torch.float64).sum())
    return score
