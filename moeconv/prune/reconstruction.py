"""The loss of a layer's output when experts are removed and tokens are re-routed as the model would: greedy order and
swaps.

NAEE (Lu et al., ACL 2024) searches the subsets of experts by this loss. Here a greedy search replaces the exhaustive
one. On the token sample all experts were evaluated, so that the loss of a removal only needs the tokens that used the
expert to be routed again.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from moeconv.families.rule import Rule, route


class Reconstruction:
    """The token sample of one layer: `logits` [T, E], `outputs` [T, E, P] of every expert, `scale` [T].

    The loss is the mean over tokens of |Y - Y_kept|^2 / scale^2. `scale` is the norm of the residual stream that the
    layer adds to, so that the loss is the error that a later norm passes on.
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
    def _independent(self) -> bool:
        """Whether the removal of an expert changes only the tokens that used it. This is false for a softmax over all
        experts that is not renormalised, where the weights of every token depend on which experts remain, and for
        router groups, which are ranked by all their experts."""
        return self.rule.groups == 1 and (self.rule.renormalise or self.rule.score != "softmax")

    def mixture(self, rows: np.ndarray, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(outputs float32 [n, P], chosen experts [n, k]) of the tokens `rows` when only the experts `allowed`, bool
        [E] or [n, E], can be chosen."""
        chosen, weights = route(self.rule, self.logits[rows], allowed, bias=self.bias, factor=self.factor)
        picked = self.outputs[rows[:, None], chosen]
        return np.einsum("tk,tkp->tp", weights.astype(np.float32), picked), chosen

    def losses(self, rows: np.ndarray, mixed: np.ndarray) -> np.ndarray:
        """The weighted squared error of each token of `rows`, float64 [n]."""
        return np.square(self.whole[rows] - mixed).sum(1, dtype=np.float64) * self.importance[rows]

    def loss(self, kept: Iterable[int]) -> float:
        """The loss when only the experts `kept` remain."""
        rows = np.arange(len(self.logits))
        return float(self.losses(rows, self.mixture(rows, self._mask(kept))[0]).sum())

    def scale(self, kept: Iterable[int]) -> float:
        """The factor on the outputs of the kept experts that minimises the loss of the layer."""
        rows = np.arange(len(self.logits))
        mixed: np.ndarray = self.mixture(rows, self._mask(kept))[0].astype(np.float64)
        square = float((mixed**2).sum(1) @ self.importance)
        return float((mixed * self.whole).sum(1) @ self.importance) / square if square > 0 else 1.0

    def order(self, protected: frozenset[int]) -> tuple[list[int], list[float]]:
        """The experts in the order of greedy removal, until one is left, and the loss of the layer after each
        removal."""
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
        """{expert: the loss of the layer if this expert is removed too}."""
        rows = np.arange(len(self.logits))
        mask = self._mask(left)
        mixed, chosen = self.mixture(rows, mask)
        now = self.losses(rows, mixed)
        total = float(now.sum())
        found = {}
        for e in left:
            if e in protected:
                continue
            users = (chosen == e).any(1).nonzero()[0] if self._independent else rows
            without = mask.copy()
            without[e] = False
            change = self.losses(users, self.mixture(users, without)[0]).sum() - now[users].sum()
            found[e] = total + float(change)
        return found

    def refine(self, kept: Iterable[int], protected: frozenset[int], *, groups: int = 1) -> list[int]:
        """Swap kept experts for dropped ones for as long as the loss falls. In each swap, the dropped expert that
        lowers the loss most comes back, and then the kept expert whose absence costs least is removed."""
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
