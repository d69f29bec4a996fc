"""Contract: every Mixture-of-Experts row with a dense twin collapses to it, and what it then computes is what was
decided."""

from __future__ import annotations

import pytest
import torch

from moeconv.families.registry import tables
from tests.contract.stock import CASES, STOCK_PAIRS, load, logits, relative_difference, save_stock

torch.set_num_threads(1)
# rows that no dense family of transformers can express, and a word of the reason
WITHOUT_TWIN = {"gpt_oss": "biases", "gemma4_text": "norm.post_shared", "dbrx": "norm"}
FIRST_CASE = {model_type: (name, config) for name, (model_type, config, _) in reversed(CASES.items())}
ROWS = {pair.target: pair for pair in sorted(STOCK_PAIRS, key=lambda pair: bool(pair.folds), reverse=True)}


def test_every_target_of_a_pair_is_collapsed_below():
    assert set(ROWS) == {pair.target for pair in STOCK_PAIRS}


@pytest.mark.slow(keep=4)
@pytest.mark.parametrize("target", sorted(ROWS))
def test_copies_collapse_to_the_dense_model(tmp_path, cli, target):
    pair = ROWS[target]
    name, config = FIRST_CASE[pair.source]
    source = save_stock(tmp_path / "dense", pair.source, config, dtype=torch.float32)
    done = cli("upcycle", source, tmp_path / "moe", "--experts", 4, "--to", target, "--no-check", "--json")
    assert done.code == 0, done.out
    done = cli("collapse", tmp_path / "moe", tmp_path / "back", "--json")
    if target in WITHOUT_TWIN:
        assert done.code == 3 and WITHOUT_TWIN[target] in done.json["error"]["message"]
        return
    assert done.code == 0, done.out
    back = load(tmp_path / "back")
    assert back.config.model_type == done.json["collapse"]["to"]
    assert tables().dense[back.config.model_type].kind == "dense"
    difference = relative_difference(logits(load(source)), logits(back))
    print(f"{name} -> {target} -> {back.config.model_type}: {difference:.1e}")
    assert difference <= max(1e-5, pair.tolerance)
