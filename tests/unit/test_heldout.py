"""Too little text: what data shaped is judged on tokens that it has not seen, falls back where it errs, and says so."""

from __future__ import annotations

import numpy as np
import pytest

from moeconv.data.heldout import FEW_TOKENS, clearly_less, few_tokens, held_out, layers_in_words, remarks_on


@pytest.mark.parametrize(("windows", "length"), [(1, 2), (1, 16), (3, 7), (15, 8), (16, 2), (40, 4)])
def test_there_is_always_a_held_out_slice_and_something_to_fit_on(windows, length):
    held = held_out(windows, length)
    assert held.shape == (windows, length) and held.any() and not held.all()
    if windows >= 16:
        assert held.all(axis=1).sum() == held.any(axis=1).sum() == windows // 16  # whole windows
    else:
        assert held.any(axis=1).all()  # of every source a part
        assert (np.diff(held.astype(int), axis=1) >= 0).all()  # the last tokens: what comes before them is its context


def test_few_tokens_are_warned_of_with_the_number_that_is_advised():
    assert few_tokens({0: FEW_TOKENS, 1: FEW_TOKENS + 1}, what="x") == []
    (warning,) = few_tokens({0: 7, 1: 9, 2: FEW_TOKENS, 3: 8}, what="--refit")
    assert (
        "7 tokens per expert on average in layers 0-1, 3" in warning and f"at least {FEW_TOKENS} are advised" in warning
    )
    assert layers_in_words([4]) == "layer 4"


def test_a_gain_must_be_above_what_so_few_tokens_may_show_by_chance():
    draw = np.random.default_rng(0)
    old = draw.random(400)
    assert clearly_less(0.9 * old, old) and not clearly_less(old, old) and not clearly_less(1.1 * old, old)
    assert not clearly_less([0.1], [0.9]), "one token shows nothing"
    by_chance = [clearly_less(draw.random(40), draw.random(40)) for _ in range(1000)]
    assert sum(by_chance) < 50
    assert sum(clearly_less(draw.random(4000), draw.random(4000) + 0.05) for _ in range(100)) == 100


def test_layers_with_too_little_text_are_told_from_those_whose_fit_is_no_better():
    row = {"tokens_per_expert": 600.0, "tokens_needed": 96, "kept": True}
    rows = [row | {"layer": 0}, row | {"layer": 1, "kept": False}]
    (better,) = remarks_on(rows, what="--refit", kept="their weights", fitted="the refitted ones")
    assert "layer 1 keep their weights, because the refitted ones are not clearly better" in better
    rows.append(row | {"layer": 2, "kept": False, "tokens_needed": 700})
    short, better = remarks_on(rows, what="--refit", kept="their weights", fitted="the refitted ones")
    assert "layer 2 keep" in short and "at least 700 tokens per expert" in short and "layer 1 keep" in better
