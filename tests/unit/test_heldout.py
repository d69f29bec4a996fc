"""Too little text: what data shaped is judged on tokens that it has not seen, falls back where it errs, and says so."""

from __future__ import annotations

import numpy as np
import pytest

from moeconv.data.heldout import FEW_TOKENS, few_tokens, held_out, layers_in_words


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
    assert "7 tokens per expert on average in layers 0-1, 3" in warning and f"{FEW_TOKENS} are the least" in warning
    assert layers_in_words([4]) == "layer 4"
