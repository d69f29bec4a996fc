"""What the tests of upcycling share."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from tests.contract.stock import DENSE_CASES, load, logits, save_stock


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A case's saved model and its logits, made once for all its targets."""

    @lru_cache(maxsize=1)
    def make(case):
        model_type, config = DENSE_CASES[case]
        source = save_stock(tmp_path_factory.mktemp("dense") / "model", model_type, config, dtype=torch.float32)
        return source, logits(load(source))

    return make
