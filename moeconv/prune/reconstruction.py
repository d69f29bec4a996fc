"""What a layer's output loses when experts go, with tokens re-routed as the model would: a greedy order, and swaps.

NAEE (Lu et al., ACL 2024) searches subsets by this loss; here it is followed greedily, on a token sample on which all
experts were evaluated, so that a removal costs a re-routing of the tokens that used the expert and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from moeconv.families.rule import Rule, route


class Reconstruction:
    """One layer's token sample: `logits` [T, E], what every expert gives `outputs` [T, E, P], `scale` [T].

    The loss is the mean over tokens of |Y - Y_kept|^2 / scale^2, `scale` the norm of the residual stream that the
    layer adds to: what a later norm sees of the error.
    """

    def __init__(
        self, rule: Rule, logits: np.ndarray, outputs: np.ndarray, *, scale: np.ndarray, bias: np.ndarray,
        factor: float,
    ) -> None:  # fmt: skip
        self.rule, self.bias, self.factor = rule, bias, factor
        self.logits: np.ndarray = logits.astype(np.float64)
        self.outputs: np.ndarray = outputs.astype(np.float32)
        self.importance = 1 / np.maximum(scale.astype(np.float64), 1e-12) ** 2 / len(logits)
        self.experts = logits.shape[1]
        self.whole = self.mixture(np.arange(len(logits)), np.ones(self.experts, bool))[0]

    @property
    def _apart(self) -> bool:
        """Whether an expert's going touches only the tokens that used it: a softmax over all experts that is not
        renormalised weighs every token's experts by what is left, and groups are ranked by all their experts."""
        return self.rule.groups == 1 and (self.rule.renormalise or self.rule.score != "softmax")

    def mixture(self, rows: np.ndarray, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(outputs float32 [n, P], chosen experts [n, k]) of the tokens `rows` among `allowed` bool [E] or [n, E]."""
        chosen, weights = route(self.rule, self.logits[rows], allowed, bias=self.bias, factor=self.factor)
        picked = self.outputs[rows[:, None], chosen]
        return np.einsum("tk,tkp->tp", weights.astype(np.float32), picked), chosen

    def losses(self, rows: np.ndarray, mixed: np.ndarray) -> np.ndarray:
        """The weighted squared error of each of these tokens, float64 [n]."""
        return np.square(self.whole[rows] - mixed).sum(1, dtype=np.float64) * self.importance[rows]

    def loss(self, kept: Iterable[int]) -> float:
        """The loss of a set of experts."""
        rows = np.arange(len(self.logits))
        return float(self.losses(rows, self.mixture(rows, self._mask(kept))[0]).sum())

    def scale(self, kept: Iterable[int]) -> float:
        """The factor on the outputs of these experts at which the layer's loss is least."""
        rows = np.arange(len(self.logits))
        mixed: np.ndarray = self.mixture(rows, self._mask(kept))[0].astype(np.float64)
        square = float((mixed**2).sum(1) @ self.importance)
        return float((mixed * self.whole).sum(1) @ self.importance) / square if square > 0 else 1.0

    def order(self, protected: frozenset[int]) -> tuple[list[int], list[float]]:
        """Experts in the order of greedy removal, down to one, and the layer's loss after each removal."""
        left = list(range(self.experts))
        gone: list[int] = []
        after: list[float] = []
        while len(left) > max(1, len(protected)):
            found = self.removals(left, protected)
            cost, expert = min((c, -e) for e, c in found.items())
            left.remove(-expert)
            gone.append(-expert)
            after.append(cost)
        return gone, after

    def removals(self, left: list[int], protected: frozenset[int]) -> dict[int, float]:
        """{expert: the layer's loss when it goes too}."""
        rows = np.arange(len(self.logits))
        mask = self._mask(left)
        mixed, chosen = self.mixture(rows, mask)
        now = self.losses(rows, mixed)
        total = float(now.sum())
        found = {}
        for e in left:
            if e in protected:
                continue
            users = (chosen == e).any(1).nonzero()[0] if self._apart else rows
            without = mask.copy()
            without[e] = False
            change = self.losses(users, self.mixture(users, without)[0]).sum() - now[users].sum()
            found[e] = total + float(change)
        return found

    def refine(self, kept: Iterable[int], protected: frozenset[int], *, groups: int = 1) -> list[int]:
        """Swaps of a kept expert for a dropped one for as long as the loss falls: the dropped expert that helps most
        comes back, then the one whose absence costs least goes."""
        best = sorted(kept)
        loss = self.loss(best)
        size = self.experts // groups
        for _ in range(self.experts):
            gone = [e for e in range(self.experts) if e not in best]
            if not gone:
                break
            back = min(gone, key=lambda e: (self.loss([*best, e]), e))
            more = sorted([*best, back])
            same_group = frozenset(e for e in more if e // size != back // size)
            found = self.removals(more, protected | same_group)
            cost, out = min((c, -e) for e, c in found.items())
            if -out == back or not cost < loss * (1 - 1e-9):
                break
            best, loss = [e for e in more if e != -out], cost
        return best

    def _mask(self, kept: Iterable[int]) -> np.ndarray:
        mask = np.zeros(self.experts, bool)
        mask[list(kept)] = True
        return mask
