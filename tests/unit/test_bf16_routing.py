"""The token sample where 16-bit logits tie: kept when the model's own picks explain it, and only then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from words import add_tokenizer, text

from moeconv.calibrate import run
from moeconv.calibrate.artifact import load_statistics
from moeconv.calibrate.run import calibrate
from moeconv.families.model import open_model
from moeconv.families.rule import Rule, explains, has_numbers, route, rule_of, weights_of
from moeconv.prune.choice import default_criterion
from moeconv.prune.criteria import Evidence
from tests.contract.stock import MOE_CASES, save_stock

pytestmark = pytest.mark.usefixtures("one_thread")

BF16 = float(torch.finfo(torch.bfloat16).eps)


def data(folder: Path, words: int) -> list[str]:
    (folder / "text").write_text(text(words))
    return [str(folder / "text")]


@pytest.mark.slow
def test_real_widths_in_bfloat16_keep_their_sample_and_prune_decides_by_it(tmp_path: Path) -> None:
    """128 experts of a router of 2048 inputs: logits tie in far more than 0.5 % of tokens."""
    path = tiny.make_moe(
        tmp_path / "moe", "qwen3_moe", experts=128, top_k=8, hidden=2048, intermediate=8, layers=1, head_dim=16
    )
    stats = tmp_path / "stats"
    done = calibrate(
        add_tokenizer(path), stats, data=data(tmp_path, 400), dtype=torch.bfloat16, seq_len=64, tokens=256, device="cpu"
    )
    assert done["warnings"] == []
    statistics, model = load_statistics(stats), open_model(path)
    logits = statistics.layer(0, "sample_logits")
    assert logits.dtype == np.float32 and np.array_equal(logits, torch.tensor(logits).bfloat16().float().numpy())
    best = -np.sort(-logits, axis=1)
    assert (best[:, 7] == best[:, 8]).mean() > 0.01, "ties at the last choice, which the rule alone cannot decide"
    evidence = Evidence(statistics=statistics, rule=rule_of(model), num_experts=model.num_experts)
    assert default_criterion(model, evidence) == "reconstruction"


@pytest.mark.parametrize("case", ["mixtral", "dots1", "deepseek_v3", "gpt_oss", "gemma4", "glm4_moe"])
def test_every_rule_in_bfloat16(tmp_path: Path, case: str) -> None:
    path = add_tokenizer(Path(save_stock(tmp_path / "moe", *MOE_CASES[case], dtype=torch.bfloat16)))
    stats = tmp_path / "stats"
    done = calibrate(path, stats, data=data(tmp_path, 600), dtype=torch.bfloat16, seq_len=16, device="cpu")
    model = open_model(path)
    assert has_numbers(model) and done["warnings"] == []
    assert all(load_statistics(stats).has(layer, "sample_unit") for layer in model.moe_layers)


def test_a_known_rule_that_the_router_does_not_follow_is_told_by_calibrate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = add_tokenizer(tiny.make_moe(tmp_path / "moe", experts=6, dtype="F32"))
    monkeypatch.setattr(run, "rule_of", lambda _model: Rule("softmax", True, 3))  # the model's top-k is 2
    done = calibrate(path, tmp_path / "stats", data=data(tmp_path, 200), seq_len=16, device="cpu")
    assert not load_statistics(tmp_path / "stats").has(0, "sample_unit")
    assert "no token sample is kept" in done["warnings"][0] and "report" in done["warnings"][0]


RULES: dict[str, tuple[Rule, Any]] = {
    "softmax": (Rule("softmax", True, 4), 0.0),
    "plain": (Rule("softmax", False, 4), 0.0),
    "sigmoid": (Rule("sigmoid", True, 4), 0.3),
    "groups": (Rule("sigmoid", True, 4, groups=4, top_groups=2), 0.3),
}


@pytest.mark.parametrize("name", RULES)
def test_picks_are_explained_within_rounding_and_not_beyond(name: str) -> None:
    rule, spread = RULES[name]
    draw = np.random.default_rng(0)
    bias = draw.standard_normal(32) * spread
    exact = draw.standard_normal((500, 32)) * 3
    logits = torch.tensor(exact).bfloat16().double().numpy()
    picks, weights = route(rule, exact, np.ones(32, bool), bias=bias)
    assert explains(rule, logits, picks, bias=bias, rounding=BF16).all()
    assert np.abs(weights_of(rule, exact, picks) - weights).max() < 1e-15
    picks[:, 0] = [next(e for e in order if e not in row) for order, row in zip(np.argsort(logits), picks)]
    assert not explains(rule, logits, picks, bias=bias, rounding=BF16).any(), "the worst expert is no tie"
