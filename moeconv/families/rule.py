"""A family's routing rule in numpy: computes expert weights from router logits, with some experts masked out.

A planner computes with it where tokens would be routed without some expert. Its results are compared with those of the
stock model on the same tokens before anything relies on them (`calibrate.sample`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeconv.families.model import Model


@dataclass(frozen=True)
class Rule:
    """The parameters of a routing rule.

    `score` is as in Routing. Experts form `groups` groups of equal size, of which a token uses the best `top_groups`. A
    group's score is the sum of the `group_best` highest scores (with the correction bias) of its experts. With
    `on_input`, a score multiplies the input of an expert, and the outputs are added with the weight 1.
    """

    score: str
    renormalise: bool
    top_k: int
    groups: int = 1
    top_groups: int = 1
    group_best: int = 2
    on_input: bool = False


def has_numbers(model: Model) -> bool:
    """Whether `route` implements the model's rule."""
    routing = model.family.experts.routing
    return routing is not None and routing.score in ("softmax", "softmax_topk", "sigmoid")


def rule_of(model: Model) -> Rule:
    """The rule of a Mixture-of-Experts model for which `has_numbers` is true."""
    routing = model.family.experts.routing
    assert routing is not None
    return Rule(routing.score, model.renormalises, model.top_k, *model.groups, routing.best_of_group, routing.on_input)


def route(
    rule: Rule, logits: np.ndarray, allowed: np.ndarray, *, bias: np.ndarray, factor: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Chosen experts, int64 [T, k], and their weights, float64 [T, k], for `logits` [T, E].

    `allowed` is bool [E] or [T, E]; the other experts are routed as if their logits were minus infinity. `bias` [E] is
    added to the scores only for the choice, and `factor` multiplies the weights. If fewer than k experts are allowed,
    the remaining weights of the row are 0.
    """
    scores = _scores(rule, np.where(allowed, logits.astype(np.float64), -np.inf))
    choice = np.where(allowed, scores + bias, -np.inf)
    if rule.groups > 1:
        choice = _in_groups(rule, choice)
    k = min(rule.top_k, logits.shape[1])
    chosen = np.argpartition(-choice, k - 1, axis=1)[:, :k] if k < logits.shape[1] else _all(choice)
    weights = np.take_along_axis(scores, chosen, 1)
    weights = np.where(np.take_along_axis(choice, chosen, 1) > -np.inf, weights, 0.0)
    return chosen, _weighed(rule, weights) * factor


def weights_of(rule: Rule, logits: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The weights, float64 [T, k], that the rule gives to the experts `chosen`, int64 [T, k], however they were chosen.

    `logits` are [T, E].
    """
    return _weighed(rule, np.take_along_axis(_scores(rule, logits.astype(np.float64)), chosen, 1))


def input_weights(rule: Rule, logits: np.ndarray) -> np.ndarray:
    """The factors [T, E] of every expert's input for `logits` [T, E]: 1 unless the weights multiply the inputs. They do
    not depend on the choice, because no family normalises such weights."""
    return _scores(rule, logits.astype(np.float64)) if rule.on_input else np.ones(logits.shape)


def explains(rule: Rule, logits: np.ndarray, chosen: np.ndarray, *, bias: np.ndarray, rounding: float) -> np.ndarray:
    """Whether the rule would choose `chosen` [T, k] for some logits close to `logits` [T, E]: bool [T].

    Close are logits that differ by at most `rounding` (relative, as `finfo.eps`). So among tied and nearly tied experts
    of a token, any may be chosen. `bias` [E] is the correction bias.
    """
    exact: np.ndarray = logits.astype(np.float64)
    size = np.abs(exact).max(axis=1, keepdims=True)
    near = np.abs(bias) + (rule.score == "sigmoid")  # sigmoid scores are of magnitude 1: they round relative to 1

    def nudged(up: np.ndarray) -> np.ndarray:
        sign = np.where(up, rounding, -rounding)
        return np.asarray(_scores(rule, exact + sign * size) + bias + sign * near)

    picked: np.ndarray = np.zeros(exact.shape, bool)
    np.put_along_axis(picked, chosen, True, 1)
    choice = nudged(picked)
    if rule.groups > 1:
        used = np.repeat(
            picked.reshape(len(picked), rule.groups, -1).any(axis=2), exact.shape[1] // rule.groups, axis=1
        )
        in_groups = _in_groups(rule, nudged(used)) > -np.inf  # groups without a chosen expert are ignored
        choice = np.where(in_groups & used, choice, -np.inf)
    worst, best_other = np.where(picked, choice, np.inf).min(axis=1), np.where(picked, -np.inf, choice).max(axis=1)
    return np.asarray((worst >= best_other) & (picked.sum(axis=1) == min(rule.top_k, exact.shape[1])))


def _scores(rule: Rule, logits: np.ndarray) -> np.ndarray:
    if rule.score == "sigmoid":
        return np.asarray(1 / (1 + np.exp(-logits)))
    shifted = logits - logits.max(axis=1, keepdims=True)
    scores = np.exp(shifted)
    if rule.score == "softmax":
        scores /= scores.sum(axis=1, keepdims=True)
    return np.asarray(scores)


def _weighed(rule: Rule, scores: np.ndarray) -> np.ndarray:
    if rule.on_input:
        return (scores > 0).astype(np.float64)
    if rule.renormalise or rule.score == "softmax_topk":
        scores = scores / np.maximum(scores.sum(axis=1, keepdims=True), 1e-20)
    return scores


def _all(choice: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.arange(choice.shape[1]), choice.shape)


def _in_groups(rule: Rule, choice: np.ndarray) -> np.ndarray:
    """The scores for the choice, [T, E], with minus infinity in the groups that a token does not use."""
    grouped = choice.reshape(len(choice), rule.groups, -1)
    best = -np.sort(-grouped, axis=2)[:, :, : rule.group_best]
    worth = best.sum(axis=2)  # a group with fewer than `group_best` experts left counts as empty, as in the stock code
    order = np.argsort(-worth, axis=1, kind="stable")[:, : rule.top_groups]
    used = np.zeros(worth.shape, bool)
    np.put_along_axis(used, order, True, 1)
    return np.where(used[:, :, None], grouped, -np.inf).reshape(choice.shape)
