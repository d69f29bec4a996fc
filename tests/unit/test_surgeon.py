"""The optimal brain surgeon against brute force: each removal costs the true increase of the error."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moeconv.prune.repair.routed_pairs import add_ridge
from moeconv.prune.repair.surgeon import fitted_columns, kept_neurons, removals

WIDTH, HIDDEN, EXPERTS = 14, 5, 3


def _problem(seed=0, *, width=WIDTH):
    draw = np.random.default_rng(seed)
    hidden = draw.normal(size=(EXPERTS, 60, width)) @ draw.normal(size=(EXPERTS, width, width))
    gram = torch.from_numpy(hidden.transpose(0, 2, 1) @ hidden)
    add_ridge(gram, 0.01)
    return gram, torch.from_numpy(draw.normal(size=(EXPERTS, HIDDEN, width)))


def _error(gram, down, kept):
    """The least error with these columns alone: every column fitted again, by a solver that knows no shortcut."""
    root = np.linalg.cholesky(gram).T  # |(D - D') G^(1/2)|
    wanted = root @ down.T
    found = np.linalg.lstsq(root[:, kept], wanted, rcond=None)[0]
    return float(np.square(wanted - root[:, kept] @ found).sum()), found.T


@pytest.mark.parametrize("batch", [64, 3, 1])
def test_each_removal_is_the_cheapest_and_costs_the_true_increase(monkeypatch, batch):
    monkeypatch.setattr("moeconv.prune.repair.surgeon._BATCH", batch)
    gram, down = _problem()
    order, costs = removals(gram.clone(), down, WIDTH - 2)
    for e in range(EXPERTS):
        left, before = list(range(WIDTH)), 0.0
        for neuron, cost in zip(order[e].tolist(), costs[e].tolist()):
            tries = {j: _error(gram[e].numpy(), down[e].numpy(), [i for i in left if i != j])[0] for j in left}
            assert neuron == min(tries, key=lambda j: tries[j])
            assert cost == pytest.approx(tries[neuron] - before, rel=1e-6)
            left.remove(neuron)
            before = tries[neuron]


def test_the_columns_that_stay_are_the_least_squares_fit():
    gram, down = _problem(1)
    kept = kept_neurons(removals(gram.clone(), down, 6)[0], WIDTH)
    assert kept.shape == (EXPERTS, WIDTH - 6) and bool((kept.diff(dim=1) > 0).all())
    made = fitted_columns(gram, down, kept)
    for e in range(EXPERTS):
        wanted = _error(gram[e].numpy(), down[e].numpy(), kept[e].tolist())[1]
        assert np.abs(made[e].numpy() - wanted).max() < 1e-8


def test_a_neuron_that_repeats_another_costs_nothing_and_its_twin_takes_it_over():
    draw = np.random.default_rng(2)
    hidden = draw.normal(size=(1, 50, 6))
    hidden[0, :, 4] = 2 * hidden[0, :, 1]
    gram = torch.from_numpy(hidden.transpose(0, 2, 1) @ hidden)
    add_ridge(gram, 1e-9)
    down = torch.from_numpy(draw.normal(size=(1, HIDDEN, 6)))
    order, costs = removals(gram.clone(), down, 1)
    assert int(order[0, 0]) in (1, 4) and float(costs[0, 0]) < 1e-6
    kept = kept_neurons(order, 6)
    narrow = torch.from_numpy(hidden[0])[:, kept[0]] @ fitted_columns(gram, down, kept)[0].T
    assert torch.allclose(narrow, torch.from_numpy(hidden[0]) @ down[0].T, atol=1e-6)


def test_an_expert_without_tokens_keeps_its_largest_columns():
    gram, down = torch.zeros(1, 8, 8, dtype=torch.float64), torch.zeros(1, HIDDEN, 8)
    add_ridge(gram, 0.3)
    down[0] = torch.tensor([3.0, 1, 8, 2, 7, 5, 4, 6])
    order, _ = removals(gram.clone(), down, 3)
    assert order[0].tolist() == [1, 3, 0]
    kept = kept_neurons(order, 8)
    assert torch.equal(fitted_columns(gram, down, kept)[0].float(), down[0][:, kept[0]])
